"""Small sets of questions of our own in the benchmarks' own file formats, to try a run without their data.

``qwenvl_eval.samples.TASK.write(folder)`` writes one and returns what to give as the data. The same call
writes the same bytes.
"""

from __future__ import annotations

import base64
import csv
import importlib
import io
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZE = 128
"""Height and width of a picture [pixels]."""


def write_sample(task: str, folder: Path) -> Path:
    """Write the sample of that task into ``folder``; returns the path to give as its data.

    Raises ValueError for a task without one, and where another file lies in its place.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if task not in known:
        raise ValueError(f"no sample of {task!r}; there is one of {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{task}").write(folder)


def write_tsv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Path:
    """A TSV file as pandas writes it; a cell that a row has not is empty.

    Raises ValueError where another file of that name lies there: it may be the benchmark itself.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{path} is there already and is not this sample; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def picture(*shapes: tuple[str, str, int, int], ground: str = "white", kind: str = "PNG") -> str:
    """Base64 of a picture of flat shapes: (circle, square or triangle; colour; centre x, y [pixels])."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (SIZE, SIZE), ground)
    draw = ImageDraw.Draw(canvas)
    for shape, colour, x, y in shapes:
        box = (x - 18, y - 18, x + 18, y + 18)
        match shape:
            case "circle":
                draw.ellipse(box, fill=colour)
            case "square":
                draw.rectangle(box, fill=colour)
            case "triangle":
                draw.polygon([(x, y - 18), (x - 18, y + 18), (x + 18, y + 18)], fill=colour)
            case _:
                raise ValueError(f"no shape is called {shape!r}; give circle, square or triangle")
    file = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {}
    canvas.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()
