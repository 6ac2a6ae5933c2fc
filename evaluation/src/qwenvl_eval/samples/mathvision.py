"""Ten questions in the columns of MathVision.tsv: numbers, LaTeX, options that are texts or letters."""

from __future__ import annotations

from pathlib import Path

from qwenvl_eval.samples import picture, write_tsv

COLUMNS = "index question choices answer category level image".split()


def write(folder: Path) -> Path:
    """MathVision.tsv in ``folder``; returns its path."""
    one = picture(("circle", "red", 64, 64))
    two = picture(("circle", "red", 32, 64), ("square", "blue", 96, 64))
    three = picture(("triangle", "red", 24, 96), ("triangle", "blue", 64, 32), ("triangle", "green", 104, 96))
    quarters = picture(*[("square", "black", x, y) for x in (32, 96) for y in (32, 96)], kind="JPEG")
    letters = ["A", "B", "C", "D", "E"]
    shapes = ["circle", "square", "triangle", "star", "ring"]
    parts = [r"$\frac{1}{4}$", r"$\frac{1}{3}$", r"$\frac{1}{2}$", "$1$", "$2$"]
    area, drawing = "metric geometry - area", "descriptive geometry"
    rows: list[tuple[str, list[str], str, str, int, str]] = [
        ("How many objects are here?", [], "2", "counting", 1, two),
        ("How many triangles are here?", [], "3", "counting", 1, three),
        ("Each square has side 3. What is their area together?", [], "36", area, 2, quarters),
        ("Which part of the shapes is red?", parts, "C", "arithmetic", 2, two),
        ("Which part of the triangles is blue?", parts, "B", "arithmetic", 2, three),
        ("Which shape is red?", shapes, "A", "logic", 1, one),
        ("Which shape is blue?", shapes, "B", "logic", 1, two),
        ("From left to right, which triangle is highest?", letters, "B", drawing, 3, three),
        ("The circle has radius 2. What is its area?", [], r"4\pi", area, 4, one),
        ("In how many orders can the shapes stand?", [], "2", "combinatorics", 5, two),
    ]
    cells = [
        {
            "index": str(index),
            "question": f"{question}\n<image1>",
            "choices": str(choices),
            "answer": answer,
            "category": subject,
            "level": str(level),
            "image": image,
        }
        for index, (question, choices, answer, subject, level, image) in enumerate(rows, 1)
    ]
    return write_tsv(folder / "MathVision.tsv", COLUMNS, cells)
