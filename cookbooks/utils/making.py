"""Pictures and documents that the notebooks ask about, each with the truth about it.

Everything is drawn here or comes with the repository (`qwen-vl-finetune/demo`), so that nothing is fetched.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from qwen_vl_utils.grounding import Box, Box3D, Camera, corners, rounded, to_relative

from .model import REPOSITORY

DEMO = REPOSITORY / "qwen-vl-finetune" / "demo"


@dataclass(frozen=True)
class Pictured:
    """A picture and the boxes in it, labelled, in its pixels."""

    picture: Image.Image
    boxes: tuple[Box, ...]

    @property
    def answer(self) -> str:
        """What a model that sees perfectly writes: `bbox_2d`, 0 to 1000, and `label`."""
        width, height = self.picture.size
        found = [rounded(to_relative(box, height=height, width=width)) for box in self.boxes]
        return json.dumps([{"bbox_2d": list(box.xyxy), "label": box.label} for box in found])


def demo_scenes() -> list[Pictured]:
    """The demo's pictures of flat shapes that have boxes, 128 x 128 pixels."""
    coco = json.loads((DEMO / "boxes.coco.json").read_text())
    names = {one["id"]: one["name"] for one in coco["categories"]}
    scenes = []
    for image in coco["images"]:
        boxes = []
        for one in coco["annotations"]:
            if one["image_id"] == image["id"]:
                x, y, width, height = one["bbox"]
                boxes.append(Box(x1=x, y1=y, x2=x + width, y2=y + height, label=names[one["category_id"]]))
        scenes.append(Pictured(Image.open(DEMO / "images" / image["file_name"]).convert("RGB"), tuple(boxes)))
    return scenes


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it along: the same letters everywhere, umlauts too."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def written(lines: Sequence[str], *, width: int = 448, size: int = 20, margin: int = 16) -> Pictured:
    """Lines of dark text on white, each with its box and itself as the label; "" leaves a line empty."""
    step = round(1.6 * size)
    picture = Image.new("RGB", (width, 2 * margin + step * len(lines)), "white")
    draw, boxes = ImageDraw.Draw(picture), []
    for number, line in enumerate(lines):
        place = (margin, margin + step * number)
        x1, y1, x2, y2 = draw.textbbox(place, line, font=font(size))
        if x2 > width:
            raise ValueError(f"width={width} is too small for {line!r}, which needs {x2 + margin:g}")
        draw.text(place, line, fill=(20, 20, 20), font=font(size))
        if line:
            boxes.append(Box(x1=x1, y1=y1, x2=x2, y2=y2, label=line))
    return Pictured(picture, tuple(boxes))


def german(amount: float) -> str:
    """1234.5 as a German invoice writes it: 1.234,50 €."""
    return f"{amount:,.2f} €".translate(str.maketrans(",.", ".,"))


GOODS = (("Bürostuhl", 189.9), ("Schreibtisch", 1249.0), ("Leselampe", 42.5), ("Aktenschränkchen", 318.75),
         ("Grußkarten", 12.4), ("Türschild", 27.0))  # fmt: skip


def german_invoice(seed: int) -> tuple[Pictured, dict[str, Any]]:
    """A German invoice and what is in it: number, date (ISO), positions, total; amounts as numbers."""
    random = Random(seed)
    day, month, number = random.randint(1, 28), random.randint(1, 12), random.randint(1000, 9999)
    positions = [
        {"name": name, "count": (count := random.randint(1, 4)), "amount": round(count * price, 2)}
        for name, price in random.sample(GOODS, 3)
    ]
    total = round(sum(one["amount"] for one in positions), 2)
    lines = ["Möbelhaus Groß & Söhne", f"Rechnung Nr. {number}", f"Datum: {day:02d}.{month:02d}.2026", ""]
    lines += [f"{one['count']} × {one['name']}   {german(one['amount'])}" for one in positions]
    lines += ["", f"Gesamtbetrag: {german(total)}"]
    truth = {
        "number": str(number),
        "date": f"2026-{month:02d}-{day:02d}",
        "positions": positions,
        "total": total,
    }
    return written(lines), truth


BOX_3D = ("x", "y", "z", "x_size", "y_size", "z_size", "roll", "pitch", "yaw")
"""The nine numbers of `bbox_3d`."""


@dataclass(frozen=True)
class Room:
    """Coloured boxes on a floor, seen by a camera that is known."""

    picture: Image.Image
    camera: Camera
    boxes: tuple[Box3D, ...]

    @property
    def answer(self) -> str:
        """What a model that sees perfectly writes: `bbox_3d` in metres and units of pi."""
        names = ("x", "y", "z", "x_size", "y_size", "z_size", "roll", "pitch", "yaw")
        found = [
            {"bbox_3d": [getattr(box, name) for name in names], "label": box.label} for box in self.boxes
        ]
        return json.dumps(found)


COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (210, 60, 50), "green": (60, 160, 80), "blue": (60, 90, 210), "yellow": (230, 200, 60),
}  # fmt: skip
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))
"""The sides of a cuboid by the indices of `corners`."""


def room(seed: int, *, count: int = 3, width: int = 320, height: int = 256) -> Room:
    """A room of `count` cuboids one behind the other, turned about the vertical axis."""
    random = Random(seed)
    camera = Camera.from_field_of_view(height=height, width=width)
    names = random.sample(list(COLOURS), count)
    boxes = []
    for number, name in enumerate(names):
        size = [round(random.uniform(0.5, 1.0), 2) for _ in range(3)]
        z = round(3.0 + 0.7 * number, 2)
        x = round(0.8 * (number - (count - 1) / 2) + random.uniform(-0.1, 0.1), 2)
        numbers = [x, round(1.0 - size[1] / 2, 2), z, *size, 0.0, round(random.uniform(-0.25, 0.25), 2), 0.0]
        boxes.append(Box3D(**dict(zip(BOX_3D, numbers, strict=True)), label=f"{name} box"))
    picture = Image.new("RGB", (width, height), (225, 228, 232))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, height / 2, width, height), fill=(190, 190, 185))
    for box, name in reversed(list(zip(boxes, names, strict=True))):
        points = corners(box)
        for face in sorted(FACES, key=lambda face: -sum(points[index][2] for index in face)):
            shade = 0.7 + 0.1 * FACES.index(face) / 2
            colour = tuple(round(shade * value) for value in COLOURS[name])
            draw.polygon([camera.project(points[index]) for index in face], fill=colour)
    return Room(picture, camera, tuple(boxes))
