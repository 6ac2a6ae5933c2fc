"""What a model says about places, as values: the types that parsing gives and drawing takes.

Coordinates carry no unit of their own: a model declares whether it speaks of 0 to 1000 or of pixels, see
`convert`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar


def _check_finite(place: Any, *names: str) -> None:
    for name in names:
        value = getattr(place, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{type(place).__name__}.{name}={value!r} must be a finite number")


def _check_order(place: Any, low: str, high: str) -> None:
    if getattr(place, low) > getattr(place, high):
        raise ValueError(
            f"{type(place).__name__}.{low}={getattr(place, low)} is above {high}={getattr(place, high)}; "
            "swap the two"
        )


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle, x to the right and y down, x1 <= x2 and y1 <= y2; one without area is allowed."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_finite(self, "x1", "y1", "x2", "y2")
        _check_order(self, "x1", "x2")
        _check_order(self, "y1", "y2")

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point, x to the right and y down."""

    x: float
    y: float
    label: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_finite(self, "x", "y")

    @property
    def xy(self) -> tuple[float, float]:
        return self.x, self.y


@dataclass(frozen=True, kw_only=True)
class Box3D:
    """A cuboid before the camera: x to the right, y down, z forward; centre and full sizes in metres.

    Angles are in units of pi (0.5 is 90 degrees), as Qwen3-VL writes them: the cuboid turns about x by roll,
    then about y by pitch, then about z by yaw, all three the fixed axes of the camera.
    """

    x: float
    y: float
    z: float
    x_size: float
    y_size: float
    z_size: float
    roll: float
    pitch: float
    yaw: float
    label: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_finite(self, *BOX_3D_NUMBERS)
        for name in ("x_size", "y_size", "z_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"Box3D.{name}={getattr(self, name)} must not be negative")

    @property
    def radians(self) -> tuple[float, float, float]:
        """(roll, pitch, yaw) in radians."""
        return self.roll * math.pi, self.pitch * math.pi, self.yaw * math.pi

    @property
    def degrees(self) -> tuple[float, float, float]:
        """(roll, pitch, yaw) in degrees."""
        return self.roll * 180, self.pitch * 180, self.yaw * 180


BOX_3D_NUMBERS = ("x", "y", "z", "x_size", "y_size", "z_size", "roll", "pitch", "yaw")
"""The nine numbers of `bbox_3d` in their order."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a video in seconds, start <= end."""

    start: float
    end: float
    label: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_finite(self, "start", "end")
        _check_order(self, "start", "end")


@dataclass(frozen=True, kw_only=True)
class Element:
    """A part of a document: what it is, where it is and what it says.

    `text` is its own text without tags; what stands in a located element within it belongs to that one. The
    source is `answer[element.start:element.end]`, for a table's markup.
    """

    tag: str
    box: Box
    text: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A function that the model wants called; nothing has checked its name or its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)


Item = TypeVar("Item", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Parsed(Generic[Item]):
    """What an answer held, and in what state it was.

    items: every whole item, in the order in which they begin.
    truncated: the answer ended inside something; what it was in the middle of is not among the items.
    repairs: the kinds of mistake that were mended, each once, sorted; empty for clean output.
    dropped: one line for each item that was whole and could not be used, saying why.
    """

    items: tuple[Item, ...]
    truncated: bool = False
    repairs: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Nothing was cut off, mended or left out."""
        return not (self.truncated or self.repairs or self.dropped)
