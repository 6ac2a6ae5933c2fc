"""Metrics for data of one's own: texts by edit distance, boxes by overlap, all without a model.

The protocols :func:`anls`, :func:`edit_distance` and :func:`iou` are right from a threshold on; ``extracted``
of their verdicts is the score, with four decimals, in front of what was read.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_eval.scoring.detection import LabelledBox, all_matched
from qwenvl_eval.scoring.exact import exact_match, normalise
from qwenvl_eval.scoring.verdict import Outcome, Verdict

ANLS_THRESHOLD = 0.5
IOU_THRESHOLD = 0.5
_LONGEST = 20_000  # characters of an answer that are compared

_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


def exact(answer: str, target: Mapping[str, Any]) -> Verdict:
    """Right where the answer is one of the texts ``target["answer"]``, see :func:`exact_match`."""
    if not answer.strip():
        return Verdict(Outcome.UNPARSED)
    right = any(exact_match(answer, gold) for gold in _golds(target))
    return Verdict(Outcome.RIGHT if right else Outcome.WRONG, normalise(answer))


def anls(answer: str, target: Mapping[str, Any]) -> Verdict:
    """Right where the ANLS of DocVQA is above zero; ``target["answer"]`` is a text or a list of texts."""
    if not answer.strip():
        return Verdict(Outcome.UNPARSED)
    return _graded(anls_score(answer, _golds(target)), 0.0, answer)


def edit_distance(answer: str, target: Mapping[str, Any]) -> Verdict:
    """Right where the similarity to the nearest of ``target["answer"]`` is ``target["similarity"]`` or more.

    Without ``similarity`` it has to be 1: the same text, spelling and case included.
    """
    if not answer.strip():
        return Verdict(Outcome.UNPARSED)
    score = max(edit_similarity(answer.strip()[:_LONGEST], gold.strip()) for gold in _golds(target))
    return _graded(score, target.get("similarity", 1.0), answer)


def iou(answer: str, target: Mapping[str, Any]) -> Verdict:
    """Right where the answer's boxes and ``target["boxes"]`` pair one to one, each pair overlapping by
    ``target["iou"]`` or more, 0.5 without it; the score is the overlap of the worst pair.

    A box is ``[x1, y1, x2, y2]``, in the coordinates that the target has, in brackets of either kind, alone
    or in JSON such as ``{"bbox": [..]}``; labels are not compared. Where one box is wanted, several that
    differ are no answer.
    """
    boxes = list(dict.fromkeys(tuple(map(float, found)) for found in _BOX.findall(answer)))
    if not boxes or (len(target["boxes"]) == 1 < len(boxes)):
        return Verdict(Outcome.UNPARSED)
    score = worst_overlap(target["boxes"], boxes)
    return _graded(score, target.get("iou", IOU_THRESHOLD), ", ".join(str(list(box)) for box in boxes))


def anls_score(answer: str, golds: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one answer, 0 to 1 (Biten et al. 2019, ICDAR DocVQA).

    1 - distance / longer length to the nearest gold text, in lower case and with single spaces; 0 where the
    distance is ``threshold`` of the length or more.
    Raises ValueError for no gold texts.
    """
    if not golds:
        raise ValueError("no gold texts: an answer has nothing to be compared with; give one or more")
    answer = " ".join(answer[:_LONGEST].lower().split())
    best = max(edit_similarity(answer, " ".join(gold.lower().split())) for gold in golds)
    return best if 1 - best < threshold else 0.0


def edit_similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for two empty ones."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(one, other)


def worst_overlap(wanted: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> float:
    """The largest t for which boxes [x1, y1, x2, y2] pair one to one with an IoU of t or more; 0 where their
    numbers differ.
    """
    if len(wanted) != len(found):
        return 0.0
    levels = sorted({box_iou(one, other) for one in wanted for other in found})
    truth, boxes = ([LabelledBox("", _sides(box)) for box in side] for side in (wanted, found))
    reached = bisect_left(levels, True, key=lambda level: not all_matched(truth, boxes, level))
    return levels[reached - 1] if reached else 0.0


def _sides(box: Sequence[float]) -> tuple[float, float, float, float]:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; 0 where either has no area.

    Raises ValueError for anything but four numbers.
    """
    if len(one) != 4 or len(other) != 4:
        raise ValueError(f"a box is x1, y1, x2, y2; found {list(one)} and {list(other)}")
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0 or not all(areas):
        return 0.0
    return width * height / (sum(areas) - width * height)


def _golds(target: Mapping[str, Any]) -> list[str]:
    golds = target["answer"]
    return [golds] if isinstance(golds, str) else list(golds)


def _graded(score: float, least: float, read: str) -> Verdict:
    right = score >= least and score > 0
    return Verdict(Outcome.RIGHT if right else Outcome.WRONG, f"{score:.4f} {read.strip()[:200]}")
