"""Grounds to draw on, things to put there, and where they then are.

shape or pictogram -> sprite (RGBA, cropped to what is drawn) -> scatter -> Placed(box) on the picture
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from qwenvl.nano.skills import assets
from qwenvl.nano.skills.shapes import COLOURS, SHAPES, Thing, near, polygon

Rgb = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, the last two outside

PLAIN_COLOURS = tuple(COLOURS)
# Pairs that training never shows: every shape and every colour is in some.
UNSEEN = frozenset(
    (shape, colour)
    for row, shape in enumerate(SHAPES)
    for column, colour in enumerate(PLAIN_COLOURS)
    if (column - row) % 6 == 0
)


@dataclass(frozen=True)
class Item:
    """A thing to draw: a shape with a colour, or a pictogram (colour "")."""

    shape: str
    colour: str = ""
    rgb: Rgb = (0, 0, 0)
    hollow: bool = False

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}" if self.colour else assets.name_of(self.shape)


@dataclass(frozen=True)
class Placed:
    """An item and the box of its drawn pixels."""

    item: Item
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def any_item(random: Random, split: str, *, unseen: bool = False, **fixed: str) -> Item:
    """A shape in a colour: one that training shows, or with ``unseen`` in the test one that it does not."""
    wanted = split == "test" and unseen
    while True:
        shape = fixed.get("shape") or random.choice(SHAPES)
        colour = fixed.get("colour") or random.choice(PLAIN_COLOURS)
        if ((shape, colour) in UNSEEN) == wanted:
            return Item(shape, colour, near(random, random.choice(COLOURS[colour])))


def ground(random: Random, size: tuple[int, int], away_from: Sequence[Rgb] = ()) -> Image.Image:
    """A plain, graded, noisy or striped RGB ground whose colours are far from those given."""
    first, second = _far_pair(random, away_from)
    texture = random.choice(("plain", "plain", "gradient", "noise", "stripes"))
    if texture == "plain":
        return Image.new("RGB", size, first)
    width, height = size
    if texture == "gradient":
        angle = random.uniform(0, 2 * math.pi)
        across, down = np.linspace(-0.35, 0.35, width), np.linspace(-0.35, 0.35, height)
        mix = 0.5 + math.cos(angle) * across[None, :] + math.sin(angle) * down[:, None]
    elif texture == "noise":
        mix = np.random.default_rng(random.getrandbits(32)).random((height, width), np.float32)
    else:
        mix = (np.arange(width)[None, :] // random.randint(4, 24) % 2).repeat(height, 0)
    start, change = np.array(first, np.float32), np.subtract(second, first).astype(np.float32)
    return Image.fromarray((start + change * mix[:, :, None]).clip(0, 255).astype(np.uint8))


def _far_pair(random: Random, away_from: Sequence[Rgb]) -> tuple[Rgb, Rgb]:
    """The first pair of like colours that is far from those given, or the farthest of some."""
    best, farthest = _pair(random), -1.0
    for _ in range(20 if away_from else 0):
        pair = _pair(random)
        distance = min(math.dist(a, b) for a in pair for b in away_from)
        if distance > farthest:
            best, farthest = pair, distance
        if farthest > 200:
            break
    return best


def _pair(random: Random) -> tuple[Rgb, Rgb]:
    pale = random.random() < 0.6
    r, g, b = (random.randint(190, 255) if pale else random.randint(0, 255) for _ in range(3))
    return (r, g, b), near(random, (r, g, b), 30)


def ink(random: Random, picture: Image.Image) -> Rgb:
    """A colour for text that can be read on a picture."""
    light = picture.resize((1, 1)).convert("L").getpixel((0, 0))
    assert isinstance(light, int)
    low, high = (0, 80) if light > 127 else (200, 255)
    return random.randint(low, high), random.randint(low, high), random.randint(low, high)


def sprite(random: Random, item: Item, radius: float) -> Image.Image:
    """The item as RGBA, cropped to what can be seen of it, its longer half about ``radius`` pixels."""
    if not item.colour:
        side = max(8, round(2 * radius))
        drawn = assets.pictogram(item.shape).resize((side, side), Image.Resampling.BILINEAR)
        return _cropped(drawn)
    turn = random.uniform(-0.2, 0.2)  # a square or a diamond turned further would be the other
    if item.shape not in ("square", "diamond") and random.random() < 0.5:
        turn = random.uniform(0, 2 * math.pi)
    half = math.ceil(radius) + 2
    thing = Thing(item.shape, half, half, radius, turn, random.uniform(0.35, 0.62))
    mask = Image.new("L", (4 * half, 4 * half))
    pen = ImageDraw.Draw(mask)
    pen.polygon(polygon(thing, 2), fill=255)
    if item.shape == "ring":
        pen.polygon(polygon(replace(thing, shape="circle", radius=0.55 * radius), 2), fill=0)
    if item.hollow:
        pen.polygon(polygon(replace(thing, radius=0.72 * radius), 2), fill=0)
    drawn = Image.new("RGBA", (2 * half, 2 * half), (*item.rgb, 0))
    drawn.putalpha(mask.reduce(2))
    return _cropped(drawn)


_OPAQUE = [255 * (alpha > 100) for alpha in range(256)]


def _cropped(drawn: Image.Image) -> Image.Image:
    box = drawn.getchannel("A").point(_OPAQUE).getbbox()
    assert box is not None
    return drawn.crop(box)


def scatter(
    random: Random, picture: Image.Image, items: Sequence[Item], radius: tuple[float, float], gap: int = 3
) -> list[Placed]:
    """Draw the items where they fit, ``gap`` pixels apart; where they don't, all become smaller.

    ``radius``: from, to, in pixels.
    """
    scale = 1.0
    while True:
        sprites = [sprite(random, item, scale * random.uniform(*radius)) for item in items]
        boxes = _boxes(random, picture.size, [one.size for one in sprites], gap)
        if boxes is not None:
            for one, box in zip(sprites, boxes, strict=True):
                picture.paste(one, box[:2], one)
            return [Placed(item, box) for item, box in zip(items, boxes, strict=True)]
        scale *= 0.85


def _boxes(
    random: Random, size: tuple[int, int], sizes: Sequence[tuple[int, int]], gap: int
) -> list[Box] | None:
    boxes: list[Box] = []
    for width, height in sizes:
        for _ in range(30):
            x, y = (
                random.randint(0, max(0, all_ - own)) for all_, own in zip(size, (width, height), strict=True)
            )
            box = (x, y, x + width, y + height)
            if x + width <= size[0] and y + height <= size[1] and not any(touch(box, b, gap) for b in boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def touch(one: Box, other: Box, gap: int = 0) -> bool:
    """Whether two boxes are less than ``gap`` pixels apart."""
    return (
        one[0] < other[2] + gap
        and other[0] < one[2] + gap
        and one[1] < other[3] + gap
        and other[1] < one[3] + gap
    )
