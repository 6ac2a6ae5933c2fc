"""Flat shapes and colours: their names, outlines and values."""

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

SHAPES = (
    "circle",
    "square",
    "rectangle",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "diamond",
    "pentagon",
)
PLURAL = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}

# Several anchors a name: a colour is a region, not a value.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((220, 30, 30), (240, 20, 20), (200, 20, 40)),
    "green": ((40, 160, 60), (20, 200, 40), (30, 230, 30), (60, 130, 50)),
    "blue": ((40, 70, 220), (20, 20, 240), (50, 110, 230)),
    "yellow": ((240, 220, 40), (250, 250, 30), (235, 200, 30)),
    "orange": ((250, 140, 20), (240, 120, 40)),
    "purple": ((130, 40, 170), (150, 60, 200), (100, 30, 140)),
    "pink": ((250, 130, 180), (240, 100, 160), (255, 170, 200)),
    "brown": ((130, 70, 30), (110, 60, 40), (150, 60, 45), (160, 95, 50)),
    "black": ((15, 15, 15), (5, 5, 5), (35, 35, 38)),
    "white": ((245, 245, 245), (252, 252, 252)),
    "gray": ((128, 128, 128), (105, 108, 110), (150, 150, 148)),
    "teal": ((20, 130, 130), (10, 150, 140), (30, 110, 120)),
}


@dataclass(frozen=True)
class Thing:
    """One object: its shape, centre and half size in pixels of the picture, turn in radians."""

    shape: str
    x: float
    y: float
    radius: float
    turn: float
    stretch: float


def near(random: Random, anchor: tuple[int, int, int], spread: int = 12) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, value + random.randint(-spread, spread))) for value in anchor)
    return r, g, b


@lru_cache(maxsize=64)
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape inside the unit circle."""
    turns = {"triangle": 3, "square": 4, "diamond": 4, "pentagon": 5}
    if shape in turns:
        n = turns[shape]
        start = math.pi / 4 if shape == "square" else -math.pi / 2
        points = [
            (math.cos(start + 2 * math.pi * i / n), math.sin(start + 2 * math.pi * i / n)) for i in range(n)
        ]
        return tuple((0.68 * x, y) if shape == "diamond" else (x, y) for x, y in points)
    if shape == "star":
        angles = [-math.pi / 2 + math.pi * i / 5 for i in range(10)]
        return tuple(
            ((1, 0.42)[i % 2] * math.cos(a), (1, 0.42)[i % 2] * math.sin(a)) for i, a in enumerate(angles)
        )
    if shape == "cross":
        a, b = 0.3, 0.95
        return (
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        )
    if shape == "heart":
        return tuple(
            (
                0.06 * 16 * math.sin(t) ** 3,
                -0.06 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
            for t in (2 * math.pi * i / 28 for i in range(28))
        )
    return tuple((math.cos(2 * math.pi * i / 30), math.sin(2 * math.pi * i / 30)) for i in range(30))


def polygon(thing: Thing, scale: float) -> list[tuple[float, float]]:
    """The corners of an object, in pixels times ``scale``."""
    unit = _outline(thing.shape)
    if thing.shape == "rectangle":
        unit = ((-1, -thing.stretch), (1, -thing.stretch), (1, thing.stretch), (-1, thing.stretch))
    cos, sin = math.cos(thing.turn), math.sin(thing.turn)
    r = thing.radius
    return [
        (scale * (thing.x + r * (x * cos - y * sin)), scale * (thing.y + r * (x * sin + y * cos)))
        for x, y in unit
    ]
