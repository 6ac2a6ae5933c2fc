"""Places drawn on a picture, spans of time along a video, and cuboids projected onto it.

Box3D --corners--> 8 points in metres --edges, cut before the camera--> segments --Camera.project--> pixels
picture, places in its pixels --draw_places--> a new RGB picture of the same size
frames, spans of time         --draw_spans---> one picture: the frames in a row over a line of time
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .places import Box, Box3D, Point, Span

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Vector = tuple[float, float, float]
Pixel = tuple[float, float]

NEAR = 0.01
"""Metres before the camera; what is nearer, or behind it, is cut off."""

FARTHEST = 1e12
"""Pixels from the origin up to which an edge is computed with."""

FIELD_OF_VIEW = 60.0
"""Degrees across the width, where nothing is known of the camera."""

PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6", "#ffe119",
           "#42d4f4", "#800000", "#bfef45")  # fmt: skip

LONGEST_LABEL = 120
"""Characters; the rest of a label is not drawn, however wide the picture."""

EDGES = tuple((a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b) in (1, 2, 4))
"""The 12 edges of a cuboid as pairs of indices into `corners`: those that differ in one sign."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera: focal lengths and principal point in pixels of the picture that is drawn on."""

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        for name in ("fx", "fy", "cx", "cy"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name in ("fx", "fy") and value <= 0):
                raise ValueError(f"Camera.{name}={value!r} must be a finite number, focal lengths positive")

    @classmethod
    def from_field_of_view(
        cls, *, height: float, width: float, degrees: float = FIELD_OF_VIEW, vertical: float | None = None
    ) -> "Camera":
        """A camera that looks at the centre, `degrees` across the width.

        Pixels are square unless `vertical` names the degrees across the height too. That is a guess where
        the camera is unknown: positions are then right only as far as it is.
        """
        for name, angle in (("degrees", degrees), ("vertical", degrees if vertical is None else vertical)):
            if not 0 < angle < 180:
                raise ValueError(f"{name}={angle} must lie between 0 and 180 degrees")
        fx = width / 2 / math.tan(math.radians(degrees) / 2)
        fy = fx if vertical is None else height / 2 / math.tan(math.radians(vertical) / 2)
        return cls(fx=fx, fy=fy, cx=width / 2, cy=height / 2)

    def project(self, point: Vector) -> Pixel:
        """(x, y) in pixels of a point in metres; ValueError for one that is not before the camera."""
        x, y, z = point
        if z <= 0:
            raise ValueError(f"point={point} lies behind the camera; only z > 0 has a place in the picture")
        return self.fx * x / z + self.cx, self.fy * y / z + self.cy


def corners(box: Box3D) -> tuple[Vector, ...]:
    """The 8 corners in metres; index bits 4, 2 and 1 say whether x, y and z are on the positive side.

    Turned about the camera's x axis by roll, then y by pitch, then z by yaw: Rz(yaw) Ry(pitch) Rx(roll).
    """
    found = []
    angles = [math.fmod(angle, 2) * math.pi for angle in (box.roll, box.pitch, box.yaw)]  # 2 is a full turn
    for index in range(8):
        x = box.x_size * (0.5 if index & 4 else -0.5)
        y = box.y_size * (0.5 if index & 2 else -0.5)
        z = box.z_size * (0.5 if index & 1 else -0.5)
        x, y, z = _turn((x, y, z), *angles)
        found.append((x + box.x, y + box.y, z + box.z))
    return tuple(found)


def _turn(point: Vector, roll: float, pitch: float, yaw: float) -> Vector:
    x, y, z = point
    y, z = y * math.cos(roll) - z * math.sin(roll), y * math.sin(roll) + z * math.cos(roll)
    x, z = x * math.cos(pitch) + z * math.sin(pitch), z * math.cos(pitch) - x * math.sin(pitch)
    x, y = x * math.cos(yaw) - y * math.sin(yaw), x * math.sin(yaw) + y * math.cos(yaw)
    return x, y, z


def projected_edges(box: Box3D, camera: Camera) -> tuple[tuple[Pixel, Pixel], ...]:
    """Up to 12 segments in pixels, in the order of EDGES.

    An edge that comes too near or passes behind the camera is cut at NEAR; one wholly behind is left out, and
    so is one that reaches out farther than any size in metres makes it.
    """
    points, segments = corners(box), []
    for first, second in EDGES:
        a, b = points[first], points[second]
        if max(a[2], b[2]) < NEAR:
            continue
        a, b = _before_camera(a, b), _before_camera(b, a)
        start, end = camera.project(a), camera.project(b)
        if all(abs(value) < FARTHEST for value in (*start, *end)):
            segments.append((start, end))
    return tuple(segments)


def _before_camera(point: Vector, other: Vector) -> Vector:
    """`point`, or where the line from it to `other` reaches NEAR."""
    if point[2] >= NEAR:
        return point
    share = (NEAR - point[2]) / (other[2] - point[2])
    x, y = (here + share * (there - here) for here, there in zip(point[:2], other[:2], strict=True))
    return x, y, NEAR


def draw_places(
    image: "Image.Image",
    places: Iterable[Box | Point | Box3D],
    *,
    camera: Camera | None = None,
    font: "str | os.PathLike[str] | ImageFont.FreeTypeFont | None" = None,
    palette: Sequence[str] = PALETTE,
) -> "Image.Image":
    """A new RGB picture with `places` on it, in pixels of `image` (see `convert.to_original`).

    Places with one label share a colour. Without a `camera` cuboids are projected as by a camera of 60
    degrees across the width. `font` is a font or a font file; Pillow's own has Latin letters only and shows
    boxes for others. Raises ValueError for an empty palette or something that is no place.
    """
    if not palette:
        raise ValueError("palette=() must name at least one colour")
    from PIL import ImageDraw

    from ..images import to_rgb

    drawn = to_rgb(image)
    if drawn is image:
        drawn = image.copy()
    brush = _Brush(drawn, ImageDraw.Draw(drawn), font)
    camera = camera or Camera.from_field_of_view(height=image.height, width=image.width)
    colours: dict[str, str] = {}
    labels = []
    for place in places:
        if not isinstance(place, Box | Point | Box3D):
            raise ValueError(f"place={place!r} must be a Box, a Point or a Box3D")
        colour = colours.setdefault(place.label, palette[len(colours) % len(palette)])
        labels.append((place, colour, brush.shape(place, colour, camera)))
    for place, colour, anchor in labels:  # last, so that no line crosses a label
        if place.label and anchor:
            brush.label(place.label, anchor, colour)
    return drawn


def draw_spans(
    frames: "Sequence[Image.Image]",
    seconds: Sequence[float],
    spans: Iterable[Span],
    *,
    duration: float,
    palette: Sequence[str] = PALETTE,
) -> "Image.Image":
    """A new RGB picture: `frames` side by side, each framed in the colours of the spans it lies in, and below
    them a line of time from 0 to `duration` [s] with a bar for each span.

    `seconds` is when each frame is shown. Spans with one label share a colour. Raises ValueError for no
    frames, as many times as frames, or a duration that is not positive.
    """
    if not frames or len(frames) != len(seconds):
        raise ValueError(
            f"{len(frames)} frames with {len(seconds)} times: give at least one, as many of each"
        )
    if duration <= 0:
        raise ValueError(f"duration={duration} must be positive")
    from PIL import Image, ImageDraw

    wide, high = frames[0].size
    marks = [(span, palette[number % len(palette)]) for span, number in _numbered(spans)]
    row = max(16, high // 6)
    strip = Image.new("RGB", (wide * len(frames), high + row * (len(marks) + 1)), "white")
    brush = _Brush(strip, ImageDraw.Draw(strip), None)
    for place, (frame, second) in enumerate(zip(frames, seconds, strict=True)):
        strip.paste(frame.convert("RGB").resize((wide, high)), (place * wide, 0))
        inside = [colour for span, colour in marks if span.start <= second <= span.end]
        for depth, colour in enumerate(inside):
            edge = depth * 2 * brush.line
            corners = (place * wide + edge, edge, (place + 1) * wide - 1 - edge, high - 1 - edge)
            if corners[0] < corners[2] and corners[1] < corners[3]:
                brush.draw.rectangle(corners, outline=colour, width=2 * brush.line)
        brush.draw.text((place * wide + 2, high), f"{second:.1f} s", fill="black", font=brush.font)
    scale = (strip.width - 1) / duration
    for number, (span, colour) in enumerate(marks):
        top = high + row * (number + 1)
        left, right = (min(max(edge, 0.0), duration) * scale for edge in (span.start, span.end))
        brush.draw.rectangle((left, top + 1, max(right, left + 2), top + row - 2), fill=colour)
        brush.label(span.label or f"{span.start:g} to {span.end:g} s", (left, top + row), colour)
    return strip


def _numbered(spans: Iterable[Span]) -> list[tuple[Span, int]]:
    """Each span with the number of its label, in the order in which labels come."""
    labels: dict[str, int] = {}
    return [(span, labels.setdefault(span.label, len(labels))) for span in spans]


class _Brush:
    """Draws on one picture, lines and letters in proportion to it."""

    def __init__(self, image: "Image.Image", draw: "ImageDraw.ImageDraw", font: Any):
        from PIL import ImageFont

        self.draw, (self.width, self.height) = draw, image.size
        self.line = max(1, round((self.width + self.height) / 500))
        size = max(10, round(min(self.width, self.height) / 35))
        if font is None:
            font = ImageFont.load_default(size)
        elif not isinstance(font, ImageFont.FreeTypeFont):
            font = ImageFont.truetype(os.fspath(font), size)
        self.font = font

    def shape(self, place: Box | Point | Box3D, colour: str, camera: Camera) -> Pixel | None:
        """Draw the place; the pixel that its label belongs to, or None where nothing of it is in view."""
        if isinstance(place, Box):
            return self.box(place, colour)
        if isinstance(place, Point):
            return self.point(place, colour)
        return self.cuboid(place, colour, camera)

    def box(self, box: Box, colour: str) -> Pixel | None:
        if box.x2 < 0 or box.y2 < 0 or box.x1 > self.width or box.y1 > self.height:
            return None
        # Sides outside stay outside, but within what Pillow counts with. Pixels are edges: a box to the
        # picture's width ends in its last column.
        room = 2 * self.line + 1
        x1, x2 = (min(max(x, -room), self.width + room) for x in (box.x1, max(box.x1, box.x2 - 1)))
        y1, y2 = (min(max(y, -room), self.height + room) for y in (box.y1, max(box.y1, box.y2 - 1)))
        self.draw.rectangle((round(x1), round(y1), round(x2), round(y2)), outline=colour, width=self.line)
        return box.x1, box.y1

    def point(self, point: Point, colour: str) -> Pixel | None:
        radius = 2 * self.line + 1
        x, y = point.xy
        if not (-radius <= x <= self.width + radius and -radius <= y <= self.height + radius):
            return None
        around = (x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse(around, fill=colour, outline="white", width=max(1, self.line // 2))
        return x + radius, y - radius

    def cuboid(self, box: Box3D, colour: str, camera: Camera) -> Pixel | None:
        seen = []
        for a, b in projected_edges(box, camera):
            segment = _within(a, b, self.width, self.height)
            if segment is not None:
                self.draw.line(segment, fill=colour, width=self.line)
                seen += segment
        return min(seen, key=lambda pixel: (pixel[1], pixel[0])) if seen else None

    def label(self, text: str, anchor: Pixel, colour: str) -> None:
        """`text` on a filled ground above the anchor, or as near to it as the picture has room."""
        from PIL import ImageColor

        pad = self.line + 1
        text = self.fitting(" ".join(_drawable(text).split()), self.width - 2 * pad)
        left, top, right, bottom = self.draw.textbbox((0, 0), text, font=self.font)
        wide, high = math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad
        if not text or high > self.height:
            return
        x = round(min(max(anchor[0], 0), self.width - wide))
        y = round(min(max(anchor[1] - high, 0), self.height - high))
        self.draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
        red, green, blue = ImageColor.getrgb(colour)[:3]
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
        self.draw.text((x + pad - left, y + pad - top), text, fill=ink, font=self.font)

    def fitting(self, text: str, room: float) -> str:
        """The longest beginning of `text` that is at most `room` pixels wide."""
        ending = ""
        while text and self.wide(text + ending) > room:
            # the first guess goes by the average letter, so that this takes a few rounds
            text = text[: min(len(text) - 1, int(len(text) * max(room, 0) / self.wide(text + ending)))]
            ending = "..."
        return text + ending if text else ""

    def wide(self, text: str) -> int:
        left, _, right, _ = self.draw.textbbox((0, 0), text, font=self.font)
        return math.ceil(right - left)


def _drawable(text: str) -> str:
    """`text` without halves of surrogate pairs and other things that no font has, not too long."""
    ending = "..." if len(text) > LONGEST_LABEL else ""
    return (
        "".join(one if one.isprintable() or one.isspace() else "�" for one in text[:LONGEST_LABEL]) + ending
    )


def _within(a: Pixel, b: Pixel, width: float, height: float) -> tuple[Pixel, Pixel] | None:
    """The part of the segment within the picture, or None: cuboids near the camera reach very far out."""
    start, end = 0.0, 1.0
    for here, step, limit in ((a[0], b[0] - a[0], width), (a[1], b[1] - a[1], height)):
        if step == 0:
            if not 0 <= here <= limit:
                return None
            continue
        enter, leave = sorted((-here / step, (limit - here) / step))
        start, end = max(start, enter), min(end, leave)
    if start > end:
        return None

    def at(share: float) -> Pixel:
        return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])

    return at(start), at(end)
