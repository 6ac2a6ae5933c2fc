"""From a model's coordinates to the pixels of the picture at hand, and back.

0..1000 --to_pixels--> pixels of the picture --to_relative--> 0..1000
pixels of the original --to_resized--> pixels of what the model sees --from_resized--> pixels of the original

A place is a Box, a Point, or plain numbers x, y, x, y, ... of any even count (a polygon, a training row's
box), and comes back as what it was, plain numbers as a tuple. Sizes are (height, width) or named. Results are
floats; `rounded` makes whole numbers of them. Pixels are edges, not centres: the right edge of a picture of
width w is at w, which is 1000.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from .places import Box, Point

RELATIVE = 1000
"""What relative coordinates are a share of; never 999."""

Coordinates = Literal["relative", "resized"]
"""0 to 1000 of the picture, or pixels of the picture as it was resized for the model."""

COORDINATES: dict[str, Coordinates] = {
    "qwen2_vl": "relative",
    "qwen2_5_vl": "resized",
    "qwen3_vl": "relative",
    "qwen3_vl_moe": "relative",
    "qwen3_5": "relative",
    "qwen3_5_moe": "relative",
}
"""The `model_type` of a checkpoint's configuration -> what its models speak."""

Place = TypeVar("Place", Box, Point, Sequence[float])


def coordinates_of(model_type: str) -> Coordinates:
    """What models of this `model_type` speak; ValueError for one that is not known."""
    if model_type not in COORDINATES:
        raise ValueError(
            f"model_type={model_type!r} has no known coordinates; known are {', '.join(COORDINATES)}. Pass "
            "coordinates='relative' (0 to 1000) or 'resized' (pixels of the resized picture) yourself"
        )
    return COORDINATES[model_type]


def to_pixels(place: Place, *, height: float, width: float, clip: bool = False) -> Place:
    """0..1000 to pixels of a picture of this size; with `clip` nothing remains outside of it."""
    return rescale(place, from_size=(RELATIVE, RELATIVE), to_size=(height, width), clip=clip)


def to_relative(place: Place, *, height: float, width: float, clip: bool = False) -> Place:
    """Pixels of a picture of this size to 0..1000."""
    return rescale(place, from_size=(height, width), to_size=(RELATIVE, RELATIVE), clip=clip)


def rescale(
    place: Place, *, from_size: tuple[float, float], to_size: tuple[float, float], clip: bool = False
) -> Place:
    """Pixels of a picture of (height, width) `from_size` to those of the same picture at `to_size`."""
    _check_size("from_size", from_size)
    _check_size("to_size", to_size)
    (from_height, from_width), (to_height, to_width) = from_size, to_size
    moved = _each(place, lambda x: x * to_width / from_width, lambda y: y * to_height / from_height)
    return clipped(moved, height=to_height, width=to_width) if clip else moved


def clipped(place: Place, *, height: float, width: float) -> Place:
    """`place` with every coordinate within the picture; a box outside of it loses its area."""
    _check_size("size", (height, width))
    return _each(place, lambda x: min(max(x, 0), width), lambda y: min(max(y, 0), height))


def rounded(place: Place) -> Place:
    """Every coordinate to the nearest whole number, halves to the even one."""
    return _each(place, round, round)


def resized_size(
    *, height: int, width: int, image_patch_size: int, item: Mapping[str, Any] | None = None
) -> tuple[int, int]:
    """(height, width) to which `fetch_image` brings a picture of this size.

    `item` is the message item with its `min_pixels`, `max_pixels`, `resized_height` and `resized_width`;
    without bounds of its own those of `vision_process` hold. For `processor_inputs`, whose bounds come from
    the processor, name them in `item`. `image_patch_size` is 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL.
    Raises ValueError where no size fits.
    """
    from .. import vision_process

    item = item or {}
    factor = int(image_patch_size * vision_process.SPATIAL_MERGE_SIZE)
    rows, columns = item.get("resized_height"), item.get("resized_width")
    if rows is not None and columns is not None:
        return vision_process.smart_resize(rows, columns, factor)
    return vision_process.smart_resize(
        height, width, factor, min_pixels=item.get("min_pixels"), max_pixels=item.get("max_pixels")
    )


def to_resized(
    place: Place, *, height: int, width: int, image_patch_size: int, item: Mapping[str, Any] | None = None
) -> Place:
    """Pixels of the original to pixels of what the model sees: for rows that train Qwen2.5-VL."""
    size = resized_size(height=height, width=width, image_patch_size=image_patch_size, item=item)
    return rescale(place, from_size=(height, width), to_size=size)


def from_resized(
    place: Place, *, height: int, width: int, image_patch_size: int, item: Mapping[str, Any] | None = None
) -> Place:
    """Pixels of what the model sees to pixels of the original, for Qwen2.5-VL's answers."""
    size = resized_size(height=height, width=width, image_patch_size=image_patch_size, item=item)
    return rescale(place, from_size=size, to_size=(height, width))


def to_original(
    place: Place,
    *,
    coordinates: Coordinates,
    height: int,
    width: int,
    resized: tuple[int, int] | None = None,
    clip: bool = False,
) -> Place:
    """A model's place in pixels of the original picture, by what the model speaks (see `coordinates_of`).

    `resized` is the (height, width) that the model saw; only "resized" coordinates need it.
    """
    if coordinates == "relative":
        return to_pixels(place, height=height, width=width, clip=clip)
    if coordinates != "resized":
        raise ValueError(f"coordinates={coordinates!r} is neither 'relative' nor 'resized'")
    if resized is None:
        raise ValueError("coordinates='resized' needs resized=(height, width); resized_size() computes it")
    return rescale(place, from_size=resized, to_size=(height, width), clip=clip)


def _check_size(name: str, size: tuple[float, float]) -> None:
    height, width = size
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise ValueError(f"{name}={tuple(size)} must be a positive (height, width)")


def _each(place: Any, x: Callable[[float], float], y: Callable[[float], float]) -> Any:
    if isinstance(place, Box):
        return replace(place, x1=x(place.x1), y1=y(place.y1), x2=x(place.x2), y2=y(place.y2))
    if isinstance(place, Point):
        return replace(place, x=x(place.x), y=y(place.y))
    if isinstance(place, Sequence) and not isinstance(place, str) and place and len(place) % 2 == 0:
        return tuple((y if index % 2 else x)(value) for index, value in enumerate(place))
    raise ValueError(f"place={place!r} must be a Box, a Point or an even count of numbers x, y, x, y, ...")
