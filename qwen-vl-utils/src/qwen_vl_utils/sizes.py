"""Sizes and counts as plain arithmetic: no pixels, no torch, every setting an argument.

height, width [pixels] --fit--> multiples of `factor` (patch size times merge size) within the bounds
"""

import math
from collections.abc import Sequence

FRAME_FLOOR = 1.05
"""The room a video's frames keep above their minimum, however long the video (0.0.14)."""


def round_by_factor(number: float, factor: int) -> int:
    """The multiple of `factor` nearest to `number`; halves go to the even multiple."""
    return round(number / factor) * factor


def ceil_by_factor(number: float, factor: int) -> int:
    """The smallest multiple of `factor` that is at least `number`."""
    return math.ceil(number / factor) * factor


def floor_by_factor(number: float, factor: int) -> int:
    """The largest multiple of `factor` that is at most `number`."""
    return math.floor(number / factor) * factor


def bounds(
    given_min: float | None, given_max: float | None, default_min: float, default_max: float
) -> tuple[float, float]:
    """(min, max) in pixels; a default that contradicts a given bound gives way.

    It becomes half the given maximum, or double the given minimum, so that sizes remain between them.
    Raises ValueError where both are given and the minimum is above the maximum.
    """
    if given_min is not None and given_max is not None and given_min > given_max:
        raise ValueError(
            f"min_pixels={given_min} is greater than max_pixels={given_max}; lower the one or raise the other"
        )
    low = default_min if given_min is None else given_min
    high = default_max if given_max is None else given_max
    if low > high:
        return (high / 2, high) if given_min is None else (low, low * 2)
    return low, high


def frame_bounds(
    frames: int, low: float, high: float, *, frame_cap: float, total_pixels: float, frame_factor: int
) -> tuple[float, float]:
    """(min, max) pixels of one frame of a video of `frames` frames.

    The maximum is the least of `high`, `frame_cap` and the even share of `total_pixels` (counted once per
    `frame_factor` frames, as the model merges them); cap and share never fall below 1.05 times the minimum.
    """
    share = max(min(frame_cap, total_pixels / frames * frame_factor), int(low * FRAME_FLOOR), low)
    return low, min(high, share)


def room(low: float, high: float, factor: int) -> float:
    """`high`, or the smallest area of whole units that is at least `low` where none lies between the two.

    For a maximum that nobody named, so that a long video is not refused because its share is too narrow.
    """
    unit = factor * factor
    least = max(1, math.ceil(low / unit))
    return high if least <= math.floor(high / unit) else least * unit


def fit(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float, max_ratio: float
) -> tuple[int, int]:
    """(height, width): positive multiples of `factor` whose product lies in [min_pixels, max_pixels].

    The size is rounded, then scaled down or up to the bounds; where that leaves the bounds, the size in
    bounds with the closest aspect ratio is taken. Raises ValueError for a side that is not positive, an
    aspect ratio above `max_ratio`, or bounds without any multiple of factor x factor between them.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"height and width must be positive, got {height}x{width}")
    ratio = max(height, width) / min(height, width)
    if ratio > max_ratio:
        raise ValueError(
            f"absolute aspect ratio must be smaller than {max_ratio}, got {ratio} for {height}x{width} pixels"
        )
    rows = max(factor, round_by_factor(height, factor))
    columns = max(factor, round_by_factor(width, factor))
    if rows * columns > max_pixels > 0:
        beta = math.sqrt((height * width) / max_pixels)
        rows = floor_by_factor(height / beta, factor)
        columns = floor_by_factor(width / beta, factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = ceil_by_factor(height * beta, factor)
        columns = ceil_by_factor(width * beta, factor)
    if rows > 0 and columns > 0 and min_pixels <= rows * columns <= max_pixels:
        return rows, columns
    return _closest(height, width, factor, min_pixels, max_pixels)


def _closest(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size in bounds with the closest aspect ratio, of several the one closest in area."""
    unit = factor * factor
    low, high = max(1, math.ceil(min_pixels / unit)), math.floor(max_pixels / unit)
    if low > high:
        raise ValueError(
            f"no size in multiples of {factor} has between min_pixels={min_pixels} and "
            f"max_pixels={max_pixels} pixels: leave room for at least one multiple of {unit} between them"
        )
    ratio = max(height, width) / min(height, width)
    wanted = min(max(height * width / unit, low), high)

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        short, long = size
        return abs(math.log(long / short / ratio)), abs(math.log(short * long / wanted))

    candidates = []
    for short in range(1, math.isqrt(high) + 1):
        shortest, longest = max(short, -(-low // short)), high // short
        if shortest > longest:
            continue
        for long in (math.floor(short * ratio), math.ceil(short * ratio)):
            candidates.append((short, min(max(long, shortest), longest)))
    short, long = min(candidates, key=distance)
    return (short * factor, long * factor) if height <= width else (long * factor, short * factor)


def share(total: int, wanted: Sequence[int], least: Sequence[int]) -> list[int]:
    """`total` tokens divided among media that want `wanted[i]` and need `least[i]` each.

    Max-min fair: there is one level that every medium gets at most, except that none gets less than it needs;
    what is asked for below the level is given whole. Raises ValueError where the needs exceed the total.
    """
    needs = [min(low, want) for low, want in zip(least, wanted, strict=True)]
    if sum(needs) > total:
        raise ValueError(
            f"total_tokens={total} can't hold the media of this prompt, which need {sum(needs)} at their "
            "smallest; raise total_tokens, or send fewer pictures or frames"
        )

    def at(level: int) -> list[int]:
        return [max(need, min(want, level)) for need, want in zip(needs, wanted, strict=True)]

    low, high = 0, max(wanted, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle - 1)
    return at(low)


def frame_count(
    total_frames: int,
    source_fps: float,
    *,
    fps: float,
    min_frames: float,
    max_frames: float,
    frame_factor: int,
) -> int:
    """Frames to take for `fps` of a video, before the check against the video's own length."""
    low = ceil_by_factor(min_frames, frame_factor)
    high = floor_by_factor(max_frames, frame_factor)
    wanted = total_frames / source_fps * fps
    return floor_by_factor(min(min(max(wanted, low), high), total_frames), frame_factor)
