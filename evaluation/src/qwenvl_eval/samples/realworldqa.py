"""Eight questions in the columns of RealWorldQA.tsv, six with options and two without."""

from __future__ import annotations

from pathlib import Path

from qwenvl_eval.samples import picture, write_tsv

COLUMNS = "image answer index A B C D question".split()


def write(folder: Path) -> Path:
    """RealWorldQA.tsv in ``folder``; returns its path."""
    one = picture(("circle", "red", 64, 64), kind="JPEG")
    two = picture(("circle", "green", 32, 64), ("square", "blue", 96, 64), kind="JPEG")
    three = picture(("triangle", "red", 24, 96), ("square", "blue", 64, 32), ("circle", "green", 104, 96))
    rows = [
        (one, "A", "Which shape is red?", ("circle", "square", "triangle")),
        (one, "C", "The circle has which colour?", ("green", "blue", "red", "yellow")),
        (two, "B", "Which shape is blue?", ("circle", "square", "triangle")),
        (two, "A", "Is the circle left of the square?", ("Yes", "No")),
        (three, "B", "What is at the top?", ("A red triangle", "A blue square", "A green circle")),
        (three, "C", "How many objects are here?", ("1", "2", "3", "4")),
        (three, "green", "The circle has which colour?", ()),
        (two, "two", "How many objects are here?", ()),
    ]
    cells = [
        {"image": image, "answer": answer, "index": str(index), "question": question}
        | dict(zip("ABCD", options, strict=False))
        for index, (image, answer, question, options) in enumerate(rows)
    ]
    return write_tsv(folder / "RealWorldQA.tsv", COLUMNS, cells)
