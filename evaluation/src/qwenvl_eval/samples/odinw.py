"""The 13 sets of ODinW-13 with two pictures of coloured shapes each, in the published layout."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from qwenvl_eval.tasks.odinw import SETS, OdinwSet

SIZE = (72, 96)
"""Height and width of a picture [pixels]."""

CATEGORIES = ("red square", "blue circle", "Green-Triangle")
COLOURS = ("red", "blue", "green")
BLOCK = 24
"""A shape keeps within one block of a grid, so that no two touch."""


def write(folder: Path) -> Path:
    """All of it in ``folder``, which is the data to give. The same call writes the same bytes.

    Raises ValueError where another file lies in a file's place: it may be the benchmark itself.
    """
    for place, one in enumerate(SETS):
        _write_set(folder, one, random.Random(place))
    return folder


def _write_set(folder: Path, one: OdinwSet, generator: random.Random) -> None:
    height, width = SIZE
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(2):
        shapes = _shapes(generator)
        name = f"{one.name}_{number}.png"
        images.append({"id": number, "file_name": name, "height": height, "width": width, "license": 1})
        for category, (x, y, w, h) in shapes:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": category + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [],
                    "iscrowd": 0,
                }
            )
        _put(folder / one.img_prefix / name, _picture(shapes))
    content = {
        "info": {"description": "coloured shapes, made by qwenvl-eval make-sample"},
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": ""}],
        "categories": [
            {"id": place, "name": name, "supercategory": "shape"} for place, name in enumerate(CATEGORIES, 1)
        ],
        "images": images,
        "annotations": annotations,
    }
    _put(folder / one.ann_file, json.dumps(content, indent=1).encode())


def _shapes(generator: random.Random) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(category, box) of one to four shapes, each in a block of its own."""
    height, width = SIZE
    blocks = [(x, y) for y in range(0, height, BLOCK) for x in range(0, width, BLOCK)]
    shapes = []
    for x, y in generator.sample(blocks, generator.randint(1, 4)):
        w, h = generator.randint(12, BLOCK - 2), generator.randint(12, BLOCK - 2)
        shapes.append((generator.randrange(len(CATEGORIES)), (x + 1, y + 1, w, h)))
    return shapes


def _picture(shapes: list[tuple[int, tuple[int, int, int, int]]]) -> bytes:
    from PIL import Image, ImageDraw

    height, width = SIZE
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for category, (x, y, w, h) in shapes:
        box = (x, y, x + w - 1, y + h - 1)
        match category:
            case 0:
                draw.rectangle(box, fill=COLOURS[category])
            case 1:
                draw.ellipse(box, fill=COLOURS[category])
            case _:
                draw.polygon(
                    [(x + w // 2, y), (x, y + h - 1), (x + w - 1, y + h - 1)], fill=COLOURS[category]
                )
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def _put(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{path} is there already and is not this sample; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
