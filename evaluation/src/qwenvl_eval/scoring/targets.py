"""What a question and the answer that was wanted make for each metric on data of one's own.

question "Which?\\nA. a cat\\nB. a dog", answer "B"  -> choice: {"answer": "B", "options": {...}}
question "Where?", answer "[[10, 20, 300, 400]]"     -> iou:    {"boxes": [[10, 20, 300, 400]]}
any                                                  -> exact, anls, edit: {"answer": ...}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenvl_eval.scoring import choice, text
from qwenvl_eval.scoring.verdict import Scorer

METRICS: Mapping[str, Scorer] = {
    "exact": text.exact,
    "choice": choice.strict,
    "anls": text.anls,
    "edit": text.edit_distance,
    "iou": text.iou,
}

_OPTION = re.compile(r"^\(?([A-Z])[.):]\s*(\S.*)$", re.MULTILINE)
_BOX = re.compile(r"\[\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\]")


def target_of(metric: str, question: str, answer: str) -> dict[str, Any]:
    """The target of a metric. Raises ValueError where question and answer have not the form it needs."""
    if metric == "choice":
        return _options(question, answer)
    if metric == "iou":
        return _boxes(answer)
    return {"type": "open", "answer": answer}


def targets_of(question: str, answer: str, metrics: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The targets of those of the metrics for which question and answer have the form they need."""
    targets = {}
    for metric in metrics:
        try:
            targets[metric] = target_of(metric, question, answer)
        except ValueError:  # It says that the form is another.
            continue
    return targets


def _options(question: str, answer: str) -> dict[str, Any]:
    """Options are lines of the question, "A. a cat"; the answer is a letter, alone or with its text."""
    options = {letter: option.strip() for letter, option in _OPTION.findall(question)}
    letter = answer.strip()[:1]
    if letter not in options or answer.strip() not in (letter, f"{letter}. {options[letter]}"):
        raise ValueError(
            f"--metric choice: the question needs lines such as 'A. a cat', found options {options}, and the "
            f"answer one of their letters, found {answer!r}"
        )
    return {"type": "multiple-choice", "answer": letter, "options": options}


def _boxes(answer: str) -> dict[str, Any]:
    """The boxes in the answer, [x1, y1, x2, y2] each; one that stands there twice counts once."""
    boxes = [[float(number) for number in found] for found in dict.fromkeys(_BOX.findall(answer))]
    if not boxes:
        raise ValueError(f"--metric iou: the answer needs a box [x1, y1, x2, y2], found {answer!r}")
    return {"type": "open", "answer": answer, "boxes": boxes}
