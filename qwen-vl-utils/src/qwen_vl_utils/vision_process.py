"""The names of qwen-vl-utils 0.0.14, and the flow from a message item to pixels.

messages --extract_vision_info--> items --fetch_image--> PIL.Image, sides multiples of patch size * 2
                                        --fetch_video--> float32 [frames, 3, height, width] in 0..255

The constants are read when a function runs, so assigning to them changes what follows. So do the environment
variables MODEL_SEQ_LEN, FORCE_QWENVL_VIDEO_READER and TORCHCODEC_NUM_THREADS.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import media, readers, sizes, videos
from .cache import PixelCache
from .images import to_rgb
from .loading import Rules, load, load_image, load_video
from .policy import PERMISSIVE, MediaPolicy
from .reading import FileReader
from .resize import BY_PILLOW, Resampling
from .sizes import ceil_by_factor, floor_by_factor, round_by_factor
from .videos import Video

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = [
    "VIDEO_READER_BACKENDS",
    "calculate_video_frame_range",
    "ceil_by_factor",
    "extract_vision_info",
    "fetch_image",
    "fetch_video",
    "floor_by_factor",
    "get_video_reader_backend",
    "is_decord_available",
    "is_torchcodec_available",
    "process_vision_info",
    "round_by_factor",
    "smart_nframes",
    "smart_resize",
    "to_rgb",
]

MAX_RATIO = 200
SPATIAL_MERGE_SIZE = 2
IMAGE_MIN_TOKEN_NUM = 4
IMAGE_MAX_TOKEN_NUM = 16384
VIDEO_MIN_TOKEN_NUM = 128
VIDEO_MAX_TOKEN_NUM = 768

FPS = 2.0
FRAME_FACTOR = 2
FPS_MIN_FRAMES = 4
FPS_MAX_FRAMES = 768
MAX_NUM_WORKERS_FETCH_VIDEO = 8

LOW_DETAIL_PIXELS = 512 * 512
"""The maximum of a picture whose OpenAI item says `"detail": "low"`."""

# Releases up to 0.0.11: pixels at patch size 14. Set to another value they replace the token numbers.
IMAGE_FACTOR = 28
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 16384 * 28 * 28
VIDEO_MIN_PIXELS = 128 * 28 * 28
VIDEO_MAX_PIXELS = 768 * 28 * 28
VIDEO_TOTAL_PIXELS = int(128000 * 28 * 28 * 0.9)
_OLD = {name: globals()[name] for name in (
    "MIN_PIXELS", "MAX_PIXELS", "VIDEO_MIN_PIXELS", "VIDEO_MAX_PIXELS", "VIDEO_TOTAL_PIXELS"
)}  # fmt: skip

logger = logging.getLogger(__name__)
_announced: set[str] = set()

Bounds = tuple[float, float]
"""(min, max) pixels of a picture or a frame."""
FrameLimits = Callable[[Mapping[str, Any], int], Bounds]
"""(item, frames) -> (min, max) pixels of one frame."""


def __getattr__(name: str) -> Any:
    if name == "MODEL_SEQ_LEN":
        return int(float(os.environ.get("MODEL_SEQ_LEN", "128000")))
    if name == "FORCE_QWENVL_VIDEO_READER":
        return os.environ.get("FORCE_QWENVL_VIDEO_READER")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _setting(name: str) -> Any:
    """A setting that may have been assigned, and otherwise comes from the environment."""
    return getattr(sys.modules[__name__], name)


def _old_or(name: str, pixels: float) -> float:
    value = globals()[name]
    return pixels if value == _OLD[name] else value


def _warn_once(about: str, message: str) -> None:
    if about not in _announced:
        _announced.add(about)
        logger.warning(message)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[int, int]:
    """(height, width) as positive multiples of `factor` with min_pixels <= height * width <= max_pixels.

    Bounds default to IMAGE_MIN_TOKEN_NUM and IMAGE_MAX_TOKEN_NUM times factor squared. The aspect ratio is
    kept as closely as possible. Raises ValueError for a ratio above MAX_RATIO and where no size lies in the
    bounds.
    """
    low, high = sizes.bounds(
        min_pixels,
        max_pixels,
        _old_or("MIN_PIXELS", IMAGE_MIN_TOKEN_NUM * factor**2),
        _old_or("MAX_PIXELS", IMAGE_MAX_TOKEN_NUM * factor**2),
    )
    return sizes.fit(height, width, factor, low, high, MAX_RATIO)


def rules(
    factor: int, image_bounds: Bounds, frame_limits: FrameLimits, resampling: Resampling = BY_PILLOW
) -> Rules:
    """How large media become whose items name no size: pictures within `image_bounds`, frames within
    `frame_limits`, in pixels."""

    def image_target(item: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
        low, high = item.get("min_pixels"), item.get("max_pixels")
        if high is None and media.wants_low_detail(item):
            high = LOW_DETAIL_PIXELS
        return target(item, height, width, lambda: sizes.bounds(low, high, *image_bounds))

    def frame_target(item: Mapping[str, Any], frames: int, height: int, width: int) -> tuple[int, int]:
        return target(item, height, width, lambda: frame_limits(item, frames))

    def target(
        item: Mapping[str, Any], height: int, width: int, bounds: Callable[[], Bounds]
    ) -> tuple[int, int]:
        rows, columns = item.get("resized_height"), item.get("resized_width")
        if rows is not None and columns is not None:
            return smart_resize(rows, columns, factor)
        return sizes.fit(height, width, factor, *bounds(), MAX_RATIO)

    return Rules(
        factor, image_target, frame_target, FRAME_FACTOR, _readers, MAX_NUM_WORKERS_FETCH_VIDEO, resampling
    )


def _default_rules(image_patch_size: int) -> Rules:
    """The rules of 0.0.14, from the constants as they stand now."""
    factor = int(image_patch_size * SPATIAL_MERGE_SIZE)
    unit = factor**2

    def frame_limits(item: Mapping[str, Any], frames: int) -> Bounds:
        return item_frame_bounds(
            item, frames, factor, _old_or("VIDEO_MIN_PIXELS", VIDEO_MIN_TOKEN_NUM * unit)
        )

    image_bounds = (
        _old_or("MIN_PIXELS", IMAGE_MIN_TOKEN_NUM * unit),
        _old_or("MAX_PIXELS", IMAGE_MAX_TOKEN_NUM * unit),
    )
    return rules(factor, image_bounds, frame_limits)


def fetch_image(
    ele: Mapping[str, Any],
    image_patch_size: int = 14,
    *,
    policy: MediaPolicy = PERMISSIVE,
    cache: PixelCache | None = None,
) -> "Image.Image":
    """The picture of one item, RGB and upright, both sides multiples of image_patch_size *
    SPATIAL_MERGE_SIZE.

    `ele` holds the source under `image` or `image_url` (PIL.Image, path, `file://`, http(s), data URL, bytes,
    file object, numpy or torch array, or `{"url": ...}`) and optionally `resized_height` with
    `resized_width`, `min_pixels`, `max_pixels`. `policy` says what may be fetched; `cache` keeps the pixels
    of files. Raises MediaError, a ValueError that names the source.
    """
    return load_image(ele, _default_rules(image_patch_size), policy, cache)


def smart_nframes(ele: Mapping[str, Any], total_frames: int, video_fps: float) -> int:
    """How many of `total_frames` frames at `video_fps` to take; a multiple of FRAME_FACTOR.

    `ele` holds `nframes`, or `fps` (default FPS) with `min_frames` and `max_frames`. Raises ValueError for
    both and for a number outside [FRAME_FACTOR, total_frames].
    """
    nframes, fps = ele.get("nframes"), ele.get("fps")
    if nframes is not None and fps is not None:
        raise ValueError(f"only one of fps and nframes can be given, got fps={fps} and nframes={nframes}")
    if nframes is not None:
        count = round_by_factor(nframes, FRAME_FACTOR)
    else:
        least, most = ele.get("min_frames"), ele.get("max_frames")
        count = sizes.frame_count(
            total_frames,
            video_fps,
            fps=FPS if fps is None else fps,
            min_frames=FPS_MIN_FRAMES if least is None else least,
            max_frames=min(FPS_MAX_FRAMES, total_frames) if most is None else most,
            frame_factor=FRAME_FACTOR,
        )
    if not FRAME_FACTOR <= count <= total_frames:
        raise ValueError(
            f"nframes should be in [{FRAME_FACTOR}, {total_frames}], got {count}; the video has "
            f"{total_frames} frames at {video_fps} frames per second"
        )
    return count


def calculate_video_frame_range(
    ele: Mapping[str, Any], total_frames: int, video_fps: float
) -> tuple[int, int, int]:
    """(first, last, count) of the frames between `video_start` and `video_end` [seconds] of `ele`.

    The start is rounded up and the end down to a frame. Raises ValueError for an empty range.
    """
    if video_fps <= 0:
        raise ValueError(f"video_fps must be a positive number, got {video_fps}")
    if total_frames <= 0:
        raise ValueError(f"total_frames must be a positive integer, got {total_frames}")
    start, end = ele.get("video_start"), ele.get("video_end")
    if start is None and end is None:
        return 0, total_frames - 1, total_frames
    duration = total_frames / video_fps
    first, last = 0, total_frames - 1
    if start is not None:
        first = math.ceil(max(0.0, min(start, duration)) * video_fps)
    if end is not None:
        last = min(math.floor(max(0.0, min(end, duration)) * video_fps), last)
    if first >= last:
        raise ValueError(
            f"video_start={start} and video_end={end} leave no two frames: the first would be {first}, the "
            f"last {last}; the video has {total_frames} frames at {video_fps} fps ({duration:.2f} s)"
        )
    return first, last, last - first + 1


def is_decord_available() -> bool:
    """Whether decord is installed."""
    return readers.installed("decord")


def is_torchcodec_available() -> bool:
    """Whether torchcodec is installed."""
    return readers.installed("torchcodec")


def _sample(ele: Mapping[str, Any], total_frames: int, video_fps: float) -> tuple[list[int], int]:
    """(indices of the frames to take, frames they are taken from); a single frame is taken twice."""
    if total_frames == 1:
        return [0] * FRAME_FACTOR, 1
    first, last, clip_frames = calculate_video_frame_range(ele, total_frames, video_fps)
    return videos.spread(first, last, smart_nframes(ele, clip_frames, video_fps)), clip_frames


ReadVideo = Callable[[dict[str, Any]], tuple["torch.Tensor", Mapping[str, Any], float]]

_read_video_decord = FileReader("decord", _sample)
_read_video_torchvision = FileReader("torchvision", _sample)
_read_video_torchcodec = FileReader("torchcodec", _sample)
_read_video_pyav = FileReader("pyav", _sample)

VIDEO_READER_BACKENDS: dict[str, FileReader | ReadVideo] = {
    "decord": _read_video_decord,
    "torchvision": _read_video_torchvision,
    "torchcodec": _read_video_torchcodec,
    "pyav": _read_video_pyav,
}
"""name -> reader: item with `video` -> (frames uint8 [n, 3, h, w], metadata, frames per second taken)."""


def get_video_reader_backend() -> str:
    """The reader that is used: FORCE_QWENVL_VIDEO_READER, else the first installed. Logged once."""
    reader = next(_reader_order())
    if f"reader {reader}" not in _announced:
        _announced.add(f"reader {reader}")
        logger.info("qwen-vl-utils using %s to read video.", reader)
    return reader


# 0.0.14 remembered its choice, and callers that changed the environment cleared that memory.
setattr(get_video_reader_backend, "cache_clear", _announced.clear)  # noqa: B010


def _reader_order() -> Iterator[str]:
    """The forced reader alone, else the installed ones, the preferred first."""
    forced = _setting("FORCE_QWENVL_VIDEO_READER")
    if forced is None:
        yield from (name for name in readers.NAMES[:-1] if readers.installed(name))
    elif forced in VIDEO_READER_BACKENDS:
        yield forced
    else:
        raise ValueError(
            f"FORCE_QWENVL_VIDEO_READER={forced!r} is no video reader; the readers are "
            f"{', '.join(VIDEO_READER_BACKENDS)}"
        )


def _readers() -> list[tuple[str, FileReader | ReadVideo]]:
    get_video_reader_backend()  # says which
    return [(name, VIDEO_READER_BACKENDS[name]) for name in _reader_order()]


def item_frame_bounds(
    ele: Mapping[str, Any], frames: int, factor: int, default_min: float, default_max: float = math.inf
) -> tuple[float, float]:
    """(min, max) pixels of one frame from `min_pixels`, `max_pixels` and `total_pixels` of an item.

    Whatever the item says, VIDEO_MAX_TOKEN_NUM and the frame's share of `total_pixels` are not exceeded,
    except that the share never falls below 1.05 times the minimum.
    """
    given_max, total = ele.get("max_pixels"), ele.get("total_pixels")
    if total is None:
        total = _old_or("VIDEO_TOTAL_PIXELS", _setting("MODEL_SEQ_LEN") * factor * factor * 0.9)
    low, high = sizes.bounds(ele.get("min_pixels"), given_max, default_min, default_max)
    low, high = sizes.frame_bounds(
        frames,
        low,
        high,
        frame_cap=_old_or("VIDEO_MAX_PIXELS", VIDEO_MAX_TOKEN_NUM * factor * factor),
        total_pixels=total,
        frame_factor=FRAME_FACTOR,
    )
    if given_max is None:
        return low, sizes.room(low, high, factor)
    if given_max > high:
        _warn_once("max_pixels", f"The given max_pixels[{given_max}] exceeds limit[{high}].")
    if ele.get("min_pixels") is None and given_max < default_min:
        low = min(low, high / 2)  # nobody asked for a minimum that leaves no size
    return low, high


def fetch_video(
    ele: Mapping[str, Any],
    image_patch_size: int = 14,
    return_video_sample_fps: bool = False,
    return_video_metadata: bool = False,
    *,
    dtype: "torch.dtype | None" = None,
    policy: MediaPolicy = PERMISSIVE,
    cache: PixelCache | None = None,
) -> Any:
    """Sampled frames [n, 3, height, width] in 0..255, n even; float32, or `dtype` (uint8 is a quarter of it).

    `ele` holds the source under `video` or `video_url` (path, `file://`, http(s), data URL, bytes, a file
    object, or a list or array of pictures with `sample_fps` and `raw_fps`) and optionally `fps` with
    `min_frames` and `max_frames`, or `nframes`; `video_start`, `video_end` [seconds]; `min_pixels`,
    `max_pixels` of a frame; `total_pixels` of the video; `resized_height` with `resized_width`. `policy` says
    what may be fetched, and how long that and decoding may take; `cache` keeps the frames of files.

    Returns the frames, `(frames, VideoMetadata)` with `return_video_metadata`, and with
    `return_video_sample_fps` `(that, frames taken per second)`. Raises MediaError.
    """
    rules = _default_rules(image_patch_size)
    frames, metadata = load_video(ele, rules, policy, _pixel_type(dtype), cache)
    video = (frames, metadata) if return_video_metadata else frames
    return (video, metadata.sample_fps) if return_video_sample_fps else video


def _pixel_type(dtype: "torch.dtype | None") -> "torch.dtype":
    import torch

    if dtype not in (None, torch.float32, torch.uint8):
        raise ValueError(f"dtype={dtype}: frames are torch.float32 or torch.uint8")
    return torch.float32 if dtype is None else dtype


def extract_vision_info(conversations: Sequence[Any]) -> list[dict[str, Any]]:
    """The picture and video items of one conversation or of a batch, in order."""
    batch = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
    return [
        ele
        for conversation in batch
        for message in conversation
        if isinstance(message.get("content"), (list, tuple))
        for ele in message["content"]
        if is_vision_item(ele)
    ]


def is_vision_item(ele: Any) -> bool:
    """Whether a content item stands for a picture or a video."""
    if not isinstance(ele, Mapping):
        return False
    kind = ele.get("type")
    if kind in ("image", "image_url", "video", "video_url"):
        return True
    present = [key for key in ("image", "image_url", "video", "video_url") if key in ele]
    # Tables fill absent columns with None: a text item with an empty `image` is a text item.
    return any(ele[key] is not None for key in present) or (bool(present) and kind is None)


def process_vision_info(
    conversations: Sequence[Any],
    return_video_kwargs: bool = False,
    return_video_metadata: bool = False,
    image_patch_size: int = 14,
    *,
    total_tokens: int | None = None,
    dtype: "torch.dtype | None" = None,
    policy: MediaPolicy = PERMISSIVE,
    cache: PixelCache | None = None,
) -> tuple[Any, ...]:
    """(images or None, videos or None[, keyword arguments for the processor]) of all messages, in order.

    Videos are what `fetch_video` returns, with metadata if asked for. The keyword arguments are
    `do_sample_frames=False`, and without metadata `fps`, the frames taken per second of each video. With
    `total_tokens` the media share that many vision tokens, fairly; `dtype`, `policy` and `cache` are as in
    `fetch_video`. Raises MediaError, and ValueError where the media can't be made small enough.
    """
    loaded = load(
        extract_vision_info(conversations),
        _default_rules(image_patch_size),
        policy,
        _pixel_type(dtype),
        total_tokens,
        cache,
    )
    clips = [medium for medium in loaded if isinstance(medium, Video)]
    images = [medium for medium in loaded if not isinstance(medium, Video)]
    kwargs: dict[str, Any] = {"do_sample_frames": False}
    if not return_video_metadata:
        kwargs["fps"] = [clip.metadata.sample_fps for clip in clips]
    frames = [tuple(clip) if return_video_metadata else clip.frames for clip in clips]
    found = (images or None, frames or None)
    return (*found, kwargs) if return_video_kwargs else found
