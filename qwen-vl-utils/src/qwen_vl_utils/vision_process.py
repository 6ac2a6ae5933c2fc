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
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from . import media, readers, sizes, videos
from .errors import MediaError, VideoError
from .images import open_image, to_rgb
from .sizes import ceil_by_factor, floor_by_factor, round_by_factor
from .videos import Video, VideoMetadata

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

FrameLimits = Callable[[Mapping[str, Any], int], tuple[float, float]]
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


def _warn_once(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
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


def fetch_image(ele: Mapping[str, Any], image_patch_size: int = 14) -> "Image.Image":
    """The picture of one item, RGB and upright, both sides multiples of image_patch_size *
    SPATIAL_MERGE_SIZE.

    `ele` holds the source under `image` or `image_url` (PIL.Image, path, `file://`, http(s), data URL, bytes
    or `{"url": ...}`) and optionally `resized_height` with `resized_width`, `min_pixels`, `max_pixels`.
    Raises MediaError, a ValueError that names the source.
    """
    factor = int(image_patch_size * SPATIAL_MERGE_SIZE)
    return load_image(
        ele,
        factor,
        _old_or("MIN_PIXELS", IMAGE_MIN_TOKEN_NUM * factor**2),
        _old_or("MAX_PIXELS", IMAGE_MAX_TOKEN_NUM * factor**2),
    )


def load_image(ele: Mapping[str, Any], factor: int, default_min: float, default_max: float) -> "Image.Image":
    """`fetch_image` with sides that are multiples of `factor` and bounds [pixels] for an item that names
    none."""
    _, source = media.vision_source(ele)
    image = open_image(source)
    width, height = image.size
    rows, columns = _target(
        ele,
        source,
        (height, width),
        factor,
        lambda: sizes.bounds(ele.get("min_pixels"), ele.get("max_pixels"), default_min, default_max),
    )
    return image.resize((columns, rows))


def _target(
    ele: Mapping[str, Any],
    source: Any,
    size: tuple[int, ...],
    factor: int,
    bounds: Callable[[], tuple[float, float]],
) -> tuple[int, int]:
    """(height, width) for a medium of (height, width) `size`; errors name its source."""
    rows, columns = ele.get("resized_height"), ele.get("resized_width")
    try:
        if rows is not None and columns is not None:
            return smart_resize(rows, columns, factor)
        return sizes.fit(size[0], size[1], factor, *bounds(), MAX_RATIO)
    except ValueError as error:
        raise MediaError(f"{media.describe(source)}: {error}") from error


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


def _read_video(ele: Mapping[str, Any], reader: str) -> tuple["torch.Tensor", VideoMetadata, float]:
    """Frames uint8 [n, 3, h, w], metadata and frames per second taken, by one reader."""
    source, clip_frames = ele["video"], 0

    def choose(total: int, fps: float) -> Sequence[int]:
        nonlocal clip_frames
        if total == 1:
            clip_frames = 1
            return [0] * FRAME_FACTOR
        first, last, clip_frames = calculate_video_frame_range(ele, total, fps)
        return videos.spread(first, last, smart_nframes(ele, clip_frames, fps))

    threads = int(os.environ.get("TORCHCODEC_NUM_THREADS", "8"))
    try:
        decoded = readers.read(reader, media.locate(source), choose, threads)
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError(f"{media.describe(source)}: {error}") from error
    clip = (ele.get("video_start"), ele.get("video_end"))
    frames, metadata = videos.from_decoded(decoded, reader, clip_frames, clip)
    return frames, metadata, metadata.sample_fps


def _read_video_torchcodec(ele: Mapping[str, Any]) -> tuple["torch.Tensor", VideoMetadata, float]:
    return _read_video(ele, "torchcodec")


def _read_video_decord(ele: Mapping[str, Any]) -> tuple["torch.Tensor", VideoMetadata, float]:
    return _read_video(ele, "decord")


def _read_video_pyav(ele: Mapping[str, Any]) -> tuple["torch.Tensor", VideoMetadata, float]:
    return _read_video(ele, "pyav")


def _read_video_torchvision(ele: Mapping[str, Any]) -> tuple["torch.Tensor", VideoMetadata, float]:
    return _read_video(ele, "torchvision")


ReadVideo = Callable[[dict[str, Any]], tuple["torch.Tensor", Mapping[str, Any], float]]

VIDEO_READER_BACKENDS: dict[str, ReadVideo] = {
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


def _read_file(ele: dict[str, Any]) -> Video:
    """Read with the chosen reader; where it was not forced and can't decode, say so and try the next."""
    get_video_reader_backend()
    order, failures = list(_reader_order()), []
    for reader in order:
        try:
            frames, metadata, sample_fps = VIDEO_READER_BACKENDS[reader](ele)
        except VideoError as error:
            failures.append(str(error))
            if reader != order[-1]:
                logger.warning(
                    "%s can't be read with %s (%s); trying the next reader",
                    media.describe(ele["video"]), reader, error,
                )  # fmt: skip
            continue
        return Video(frames, _own_metadata(metadata, reader, sample_fps))
    raise VideoError(f"{media.describe(ele['video'])}: no reader can decode it: {'; '.join(failures)}")


def _own_metadata(metadata: Mapping[str, Any], reader: str, sample_fps: float) -> VideoMetadata:
    """Metadata in our type, also from a reader that somebody put into VIDEO_READER_BACKENDS."""
    if isinstance(metadata, VideoMetadata):
        return metadata
    indices = tuple(int(index) for index in metadata["frames_indices"])
    return VideoMetadata(
        fps=metadata["fps"],
        frames_indices=indices,
        timestamps=tuple(index / metadata["fps"] for index in indices),
        total_num_frames=metadata["total_num_frames"],
        video_backend=metadata.get("video_backend", reader),
        sample_fps=sample_fps,
    )


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
        _warn_once(f"The given max_pixels[{given_max}] exceeds limit[{high}].")
    return low, high


def load_video(ele: Mapping[str, Any], factor: int, frame_limits: FrameLimits) -> Video:
    """The sampled frames of one item, uint8 [n, 3, height, width], resized once to multiples of `factor`.

    `ele` is as for `fetch_video`. Raises MediaError, a ValueError that names the source.
    """
    _, source = media.vision_source(ele)
    if isinstance(source, (list, tuple)):
        return _load_frame_list(ele, source, factor, frame_limits)
    frames, metadata = _read_file({**ele, "video": source})
    size = tuple(frames.shape[-2:])
    rows, columns = _target(ele, source, size, factor, lambda: frame_limits(ele, len(frames)))
    return Video(videos.resize(frames, rows, columns), metadata)


def _load_frame_list(
    ele: Mapping[str, Any], source: Sequence[Any], factor: int, frame_limits: FrameLimits
) -> Video:
    if not source:
        raise VideoError("the list of frames of a video is empty")
    with ThreadPoolExecutor(min(MAX_NUM_WORKERS_FETCH_VIDEO, len(source))) as pool:
        images = list(pool.map(_open_frame, source))
    images += images[-1:] * (-len(images) % FRAME_FACTOR)
    width, height = images[0].size
    rows, columns = _target(ele, source, (height, width), factor, lambda: frame_limits(ele, len(images)))
    sample_fps = 2.0 if ele.get("sample_fps") is None else ele["sample_fps"]
    raw_fps = sample_fps if ele.get("raw_fps") is None else ele["raw_fps"]
    metadata = videos.frame_list_metadata(len(images), sample_fps, raw_fps)
    return Video(videos.stack(images, rows, columns), metadata)


def _open_frame(frame: Any) -> "Image.Image":
    return open_image(media.vision_source({"image": frame})[1])


def fetch_video(
    ele: Mapping[str, Any],
    image_patch_size: int = 14,
    return_video_sample_fps: bool = False,
    return_video_metadata: bool = False,
) -> Any:
    """Sampled frames, float32 [n, 3, height, width] in 0..255, n even.

    `ele` holds the source under `video` or `video_url` (path, `file://`, http(s), data URL, bytes, or a list
    of pictures with `sample_fps` and `raw_fps`) and optionally `fps` with `min_frames` and `max_frames`, or
    `nframes`; `video_start`, `video_end` [seconds]; `min_pixels`, `max_pixels` of a frame; `total_pixels` of
    the video; `resized_height` with `resized_width`.

    Returns the frames, `(frames, VideoMetadata)` with `return_video_metadata`, and with
    `return_video_sample_fps` `(that, frames taken per second)`. Raises MediaError.
    """
    factor = int(image_patch_size * SPATIAL_MERGE_SIZE)

    def frame_limits(ele: Mapping[str, Any], frames: int) -> tuple[float, float]:
        default_min = _old_or("VIDEO_MIN_PIXELS", VIDEO_MIN_TOKEN_NUM * factor * factor)
        return item_frame_bounds(ele, frames, factor, default_min)

    frames, metadata = load_video(ele, factor, frame_limits)
    video = (frames.float(), metadata) if return_video_metadata else frames.float()
    return (video, metadata.sample_fps) if return_video_sample_fps else video


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
) -> tuple[Any, ...]:
    """(images or None, videos or None[, keyword arguments for the processor]) of all messages, in order.

    Videos are what `fetch_video` returns, with metadata if asked for. The keyword arguments are
    `do_sample_frames=False`, and without metadata `fps`, the frames taken per second of each video.
    """
    images, clips, rates = [], [], []
    for ele in extract_vision_info(conversations):
        if media.vision_source(ele)[0] == "image":
            images.append(fetch_image(ele, image_patch_size=image_patch_size))
        else:
            clip, rate = fetch_video(ele, image_patch_size, True, return_video_metadata)
            clips.append(clip)
            rates.append(rate)
    kwargs: dict[str, Any] = {"do_sample_frames": False}
    if not return_video_metadata:
        kwargs["fps"] = rates
    found = (images or None, clips or None)
    return (*found, kwargs) if return_video_kwargs else found
