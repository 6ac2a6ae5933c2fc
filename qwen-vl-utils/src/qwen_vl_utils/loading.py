"""All media of a prompt: measured from their headers, given their sizes, loaded side by side.

    items --measure--> tokens of each --within_budget--> items --load--> pictures and videos, in order

`Rules` say how large a medium becomes; they come from the constants of `vision_process` or from a processor.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from . import media, reading, sizes, videos
from .cache import PixelCache
from .errors import MediaError, MediaRefused, VideoError
from .images import image_size, is_array, is_picture, open_image
from .policy import PERMISSIVE, Deadline, MediaPolicy
from .reading import FileReader
from .resize import Resampling
from .videos import Video, VideoSize

if TYPE_CHECKING:
    import torch

Item = Mapping[str, Any]
Readers = Sequence[tuple[str, FileReader | Callable[..., Any]]]
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Rules:
    """How large media become, and who reads videos."""

    factor: int
    """What the sides are multiples of [pixels]: patch size times merge size."""
    image_target: Callable[[Item, int, int], tuple[int, int]]
    """(item, height, width) -> (height, width) of the picture."""
    frame_target: Callable[[Item, int, int, int], tuple[int, int]]
    """(item, frames, height, width) -> (height, width) of each frame."""
    frame_factor: int
    """Frames that the model takes as one step in time."""
    readers: Callable[[], Readers]
    """The readers to try, in order."""
    frame_workers: int
    """Pictures of one list of frames that are opened at once."""
    resampling: Resampling
    """How a picture is resized, and what it is afterwards."""


@dataclass(frozen=True)
class ImageSize:
    """What a picture will be [pixels]."""

    height: int
    width: int
    natural: tuple[int, int]
    """(height, width) of the source."""


def load_image(
    item: Item, rules: Rules, policy: MediaPolicy = PERMISSIVE, cache: PixelCache | None = None
) -> Any:
    """The picture of an item, RGB and upright, at its size, as the rules' resampling returns it.

    Raises MediaError, which names the source.
    """
    _, source = media.vision_source(item)
    if cache is not None and not is_picture(source):
        return _cached_image(item, source, rules, policy, cache)
    image = open_image(source, policy, policy.start())
    width, height = image.size
    rows, columns = _named(source, rules.image_target, item, height, width)
    return rules.resampling.resize(image, rows, columns)


def _cached_image(item: Item, source: Any, rules: Rules, policy: MediaPolicy, cache: PixelCache) -> Any:
    import numpy as np

    deadline, name = policy.start(), media.describe(source)
    located = media.locate(source, policy, deadline)
    size = image_size(located, policy, deadline, name)
    rows, columns = _named(source, rules.image_target, item, *size)

    def make() -> dict[str, Any]:
        image = open_image(located, policy, deadline, name)
        return {"pixels": np.asarray(rules.resampling.resize(image, rows, columns))}

    what = {"image": [rows, columns], "resampling": rules.resampling.name}
    return rules.resampling.restore(cache.get(located, what, make)["pixels"])


def measure_image(item: Item, rules: Rules, policy: MediaPolicy = PERMISSIVE) -> ImageSize:
    """The size that `load_image` gives, from the picture's header."""
    _, source = media.vision_source(item)
    natural = image_size(source, policy, policy.start())
    return ImageSize(*_named(source, rules.image_target, item, *natural), natural)


def load_video(
    item: Item,
    rules: Rules,
    policy: MediaPolicy = PERMISSIVE,
    dtype: "torch.dtype | None" = None,
    cache: PixelCache | None = None,
) -> Video:
    """The sampled frames of an item, [n, 3, height, width] uint8 (or `dtype`), each resized once.

    Raises MediaError, which names the source.
    """
    import torch

    dtype = torch.uint8 if dtype is None else dtype
    _, source = media.vision_source(item)
    deadline = policy.start()
    if (frames := _frame_list(source, rules, policy)) is not None:
        images = _each(rules.frame_workers, lambda frame: _frame(frame, open_image, policy, deadline), frames)
        size = images[0].height, images[0].width
        rows, columns = _named(source, rules.frame_target, item, len(images), *size)
        return Video(videos.stack(images, rows, columns, dtype), _list_metadata(item, len(images)))
    size_of = _size_of(item, source, rules)
    located, name = reading.locate_video(source, policy, deadline), media.describe(source)
    item = {**item, "video": source}

    def use(reader: str, entry: FileReader | Callable[..., Any]) -> Video:
        if isinstance(entry, FileReader):
            return entry.read(item, located, size_of, dtype, policy, deadline, cache)
        frames, metadata, sample_fps = _foreign(reader, entry, item, policy)
        return Video(
            reading.resized(frames, size_of, dtype), reading.own_metadata(metadata, reader, sample_fps)
        )

    return reading.first_that_can(rules.readers(), name, use)


def measure_video(item: Item, rules: Rules, policy: MediaPolicy = PERMISSIVE) -> VideoSize:
    """The frames, size and times that `load_video` gives, from headers."""
    _, source = media.vision_source(item)
    deadline = policy.start()
    if (frames := _frame_list(source, rules, policy)) is not None:
        natural = _frame(frames[0], image_size, policy, deadline)
        target = _named(source, rules.frame_target, item, len(frames), *natural)
        return VideoSize(len(frames), *target, natural, _list_metadata(item, len(frames)))
    size_of = _size_of(item, source, rules)
    located, name = reading.locate_video(source, policy, deadline), media.describe(source)
    item = {**item, "video": source}

    def use(reader: str, entry: FileReader | Callable[..., Any]) -> VideoSize:
        if isinstance(entry, FileReader):
            return entry.measure(item, located, size_of, policy, deadline)
        frames, metadata, sample_fps = _foreign(reader, entry, item, policy)
        natural = tuple(frames.shape[-2:])
        own = reading.own_metadata(metadata, reader, sample_fps)
        return VideoSize(len(frames), *size_of(len(frames), *natural), natural, own)

    return reading.first_that_can(rules.readers(), name, use)


def load(
    items: Sequence[Item],
    rules: Rules,
    policy: MediaPolicy = PERMISSIVE,
    dtype: "torch.dtype | None" = None,
    total_tokens: int | None = None,
    cache: PixelCache | None = None,
) -> list[Any]:
    """All media of a prompt, pictures and `Video`s, in order; with `total_tokens` made smaller so that they
    fit together.

    Raises MediaError, which names the source of the first medium that can't be used.
    """
    policy.check_media(len(items))
    if total_tokens is not None:
        items = within_budget(items, measure(items, rules, policy), rules, total_tokens)

    def one(item: Item) -> Any:
        if media.vision_source(item)[0] == "image":
            return load_image(item, rules, policy, cache)
        return load_video(item, rules, policy, dtype, cache)

    return _each(_workers(), one, items)


def measure(
    items: Sequence[Item], rules: Rules, policy: MediaPolicy = PERMISSIVE
) -> list[ImageSize | VideoSize]:
    """What `load` would give, from headers."""
    policy.check_media(len(items))

    def one(item: Item) -> ImageSize | VideoSize:
        is_image = media.vision_source(item)[0] == "image"
        return (measure_image if is_image else measure_video)(item, rules, policy)

    return _each(_workers(), one, items)


def within_budget(
    items: Sequence[Item], measured: Sequence[ImageSize | VideoSize], rules: Rules, total_tokens: int
) -> list[Item]:
    """`items`, those that take more than their share with a smaller `max_pixels`.

    A medium's share is what an even division of `total_tokens` leaves it, small media keeping what they need
    (`sizes.share`). Items of an explicit size stay as they are. Raises ValueError where one token a picture
    or a step in time is too much already.
    """
    unit = rules.factor**2
    steps = [1 if isinstance(size, ImageSize) else -(-size.frames // rules.frame_factor) for size in measured]
    wanted = [step * size.height * size.width // unit for step, size in zip(steps, measured, strict=True)]
    fixed = [
        item.get("resized_height") is not None and item.get("resized_width") is not None for item in items
    ]
    least = [want if keep else step for want, keep, step in zip(wanted, fixed, steps, strict=True)]
    shares = sizes.share(total_tokens, wanted, least)
    result = []
    for item, want, given, step in zip(items, wanted, shares, steps, strict=True):
        if given < want:
            most = given // step * unit
            low = item.get("min_pixels")
            item = {**item, "max_pixels": most, "min_pixels": min(most, unit if low is None else low)}
        result.append(item)
    return result


def resized(item: Item, measured: ImageSize | VideoSize, rules: Rules) -> ImageSize | VideoSize:
    """`measured`, for the item as `within_budget` made it."""
    if isinstance(measured, ImageSize):
        return ImageSize(*rules.image_target(item, *measured.natural), measured.natural)
    height, width = rules.frame_target(item, measured.frames, *measured.natural)
    return measured._replace(height=height, width=width)


def _each(workers: int, function: Callable[[T], U], values: Sequence[T]) -> list[U]:
    """`function` of each value, in order, several at once. Raises the error of the first that fails."""
    if len(values) < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(min(workers, len(values))) as pool:
        return list(pool.map(function, values))


@lru_cache
def _workers() -> int:
    """Media that are loaded at once: as many as there are cores, up to 8."""
    return max(2, min(8, os.cpu_count() or 1))


def _named(source: Any, target: Callable[..., tuple[int, int]], *arguments: Any) -> tuple[int, int]:
    """A target size; where there is none the error names the source."""
    try:
        return target(*arguments)
    except ValueError as error:
        raise MediaError(f"{media.describe(source)}: {error}") from error


def _size_of(item: Item, source: Any, rules: Rules) -> reading.SizeOf:
    return lambda frames, height, width: _named(source, rules.frame_target, item, frames, height, width)


def _foreign(
    reader: str, entry: Callable[..., Any], item: Item, policy: MediaPolicy
) -> tuple[Any, Any, float]:
    """What a registered function of somebody else's reads."""
    if policy != PERMISSIVE:
        raise MediaRefused(
            f"the video reader {reader!r} in VIDEO_READER_BACKENDS is a function of its own, for which no "
            "policy can vouch; take it out, or read without a policy"
        )
    return entry(dict(item))


def _frame_list(source: Any, rules: Rules, policy: MediaPolicy) -> list[Any] | None:
    """The frames of a list or an array, the last one repeated to whole steps in time; None for a file."""
    if not isinstance(source, (list, tuple)) and not is_array(source):
        return None
    name = media.describe(source)
    if not isinstance(source, (list, tuple)) and len(source.shape) != 4:
        raise VideoError(f"{name}: an array of frames has four axes, [n, h, w, 3] or [n, 3, h, w]")
    frames = list(source)
    if not frames:
        raise VideoError("the list of frames of a video is empty")
    policy.check_frames(len(frames), name)
    return frames + frames[-1:] * (-len(frames) % rules.frame_factor)


def _frame(
    frame: Any,
    use: Callable[[Any, MediaPolicy, Deadline], T],
    policy: MediaPolicy,
    deadline: Deadline,
) -> T:
    return use(media.vision_source({"image": frame})[1], policy, deadline)


def _list_metadata(item: Item, frames: int) -> videos.VideoMetadata:
    sample_fps = 2.0 if item.get("sample_fps") is None else item["sample_fps"]
    raw_fps = sample_fps if item.get("raw_fps") is None else item["raw_fps"]
    return videos.frame_list_metadata(frames, sample_fps, raw_fps)
