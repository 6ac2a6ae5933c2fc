"""Ten validation questions and two dev questions in the columns of MMMU_DEV_VAL.tsv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from qwenvl_eval.samples import picture, write_tsv
from qwenvl_eval.tasks.mmmu import DISCIPLINE_OF

COLUMNS = (
    "id index question split A B C D answer topic_difficulty subfield image_type question_type explanation "
    "image image_path E F G H I category l2-category"
).split()
COLOURS = ("red", "blue", "green", "yellow")


def write(folder: Path) -> Path:
    """MMMU_DEV_VAL.tsv in ``folder``; returns its path."""
    rows = [{**row, "index": str(index)} for index, row in enumerate(_dev() + _choices() + _open(), 1)]
    return write_tsv(folder / "MMMU_DEV_VAL.tsv", COLUMNS, rows)


def _dev() -> list[dict[str, str]]:
    circle = picture(("circle", "red", 64, 64))
    return [
        _row("dev_Art_1", "<image 1> Which shape is red?", ("circle", "square"), "A", [circle]),
        _row("dev_Math_1", "<image 1> How many objects are here?", (), "1", [circle]),
    ]


def _choices() -> list[dict[str, str]]:
    circle = picture(("circle", "red", 64, 64))
    square = picture(("square", "blue", 64, 64), ground="lightgrey", kind="JPEG")
    both = picture(("circle", "green", 32, 64), ("triangle", "yellow", 96, 64))
    stair = picture(("square", "red", 24, 24), ("square", "blue", 64, 64), ("square", "green", 104, 104))
    return [
        _row("validation_Art_1", "<image 1> The circle has which colour?", COLOURS, "A", [circle]),
        _row("validation_Design_1", "Which colour has the square in <image 1>?", COLOURS, "B", [square]),
        _row(
            "validation_Art_Theory_1",
            "Which picture shows a square?",
            ("<image 1>", "<image 2>", "<image 3>"),
            "B",
            [circle, square, both],
        ),
        _row(
            "validation_Accounting_1",
            "Asset\tValue\n\"Circle\"\t$6\n'Triangle'\t$7\nWhat is the value of the yellow one in <image 1>?",
            ("$6", "$7", "None", "N/A"),
            "B",
            [both],
        ),
        _row(
            "validation_Physics_1", "What comes first, <image 1> or <image 2>?", COLOURS, "D", [stair, both]
        ),
        _row(
            "validation_Public_Health_1",
            "The middle square has which colour?",
            ("black", "white", "grey", "pink", "orange", "blue"),
            "F",
            [stair],
        ),
    ]


def _open() -> list[dict[str, str]]:
    pair = picture(("circle", "red", 32, 64), ("circle", "blue", 96, 64))
    three = picture(("square", "red", 24, 24), ("square", "blue", 64, 64), ("circle", "green", 104, 104))
    return [
        _row("validation_Math_1", "<image 1> How many objects are here?", (), "['3', 'three']", [three]),
        _row("validation_Math_2", "<image 1> How many circles are here?", (), "2", [pair]),
        _row("validation_Sociology_1", "<image 1> Which shape is green?", (), "circle", [three]),
        _row("validation_Energy_and_Power_1", "<image 1> Which colour is left?", (), "red", [pair]),
    ]


def _row(
    id: str, question: str, options: Sequence[str], answer: str, pictures: Sequence[str]
) -> dict[str, str]:
    split, _, rest = id.partition("_")
    subject = rest.rpartition("_")[0]
    return {
        "id": id,
        "question": question,
        "split": split,
        **dict(zip(ascii_uppercase, options, strict=False)),
        "answer": answer,
        "topic_difficulty": "Easy",
        "image_type": "['Drawings']",
        "question_type": "multiple-choice" if options else "open",
        "image": str(list(pictures)),
        "image_path": str([f"{id}_{number}.jpg" for number in range(1, len(pictures) + 1)]),
        "category": subject,
        "l2-category": DISCIPLINE_OF[subject],
    }
