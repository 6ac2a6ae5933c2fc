"""Boxes against boxes: COCO's average precision, and what ODinW makes of it.

    pictures with their truth and what was found, by names -> coco_dicts -> coco_stats -> AP
                                                                  \\-> order_spread -> AP at other list orders

A box is x, y, width and height in pixels. The arithmetic is faster-coco-eval's, which is pycocotools in C++.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COCO_LIMITS = (1, 10, 100)
"""Detections of one category in one picture that COCO looks at."""

ODINW_LIMITS = (100, 300, 1000)

ORDERS = 20
"""List orders that the spread is taken over, besides the one given."""


@dataclass(frozen=True)
class CocoStats:
    """Average precision, 0 to 1, of IoU .5:.05:.95 unless named; None where the truth has no such box."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None
    medium: float | None
    large: float | None


@dataclass(frozen=True)
class LabelledBox:
    """``box``: x, y, width, height [pixels]. A ``crowd`` may be found or not and counts neither way."""

    label: str
    box: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class Picture:
    """``id``: its number in the annotation file, by which COCO sorts; ``found``: in the model's own order."""

    id: int
    truth: Sequence[LabelledBox]
    found: Sequence[LabelledBox]


@dataclass(frozen=True)
class CocoInput:
    """COCO's two files as objects; ``unknown`` counts the labels of boxes that no category has."""

    ground_truth: Mapping[str, Any]
    detections: Sequence[Mapping[str, Any]]
    unknown: Counter[str]


def coco_dicts(pictures: Sequence[Picture], categories: Iterable[str]) -> CocoInput:
    """Pictures as COCO wants them, every score 1. Names are the same whatever their case.

    Raises ValueError for truth of no category and for pictures that share an id.
    """
    number = {
        _name(category): place for place, category in enumerate(dict.fromkeys(map(_name, categories)), 1)
    }
    if len({picture.id for picture in pictures}) < len(pictures):
        twice = Counter(picture.id for picture in pictures).most_common(1)[0][0]
        raise ValueError(f"picture {twice} stands more than once; give each picture once")
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    unknown: Counter[str] = Counter()
    for picture in pictures:
        for one in picture.truth:
            if _name(one.label) not in number:
                raise ValueError(f"picture {picture.id} has truth of {one.label!r}, which is no category")
            entry = {"image_id": picture.id, "category_id": number[_name(one.label)], "bbox": list(one.box)}
            area = one.box[2] * one.box[3]
            truth.append({**entry, "id": len(truth) + 1, "area": area, "iscrowd": int(one.crowd)})
        for one in picture.found:
            if _name(one.label) in number:
                category = number[_name(one.label)]
                box = list(one.box)
                found.append({"image_id": picture.id, "category_id": category, "bbox": box, "score": 1.0})
            else:
                unknown[one.label] += 1
    ground_truth = {
        "images": [{"id": picture.id} for picture in pictures],
        "annotations": truth,
        "categories": [{"id": place, "name": name} for name, place in number.items()],
    }
    return CocoInput(ground_truth, found, unknown)


def coco_stats(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    max_detections: Sequence[int] = COCO_LIMITS,
) -> CocoStats:
    """COCO's first six figures, as pycocotools prints them.

    ``ground_truth``: the object of an annotation file, ``images``, ``annotations`` and ``categories``.
    ``detections``: ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``; of equal scores
    the earlier comes first. ``max_detections``: of a category in a picture, rising. As in pycocotools, ``ap``
    looks at 100 and all others at the last of them. Without detections each figure is 0 or None.
    Raises ValueError for detections of other pictures or categories, and for limits without 100.
    """
    if 100 not in max_detections or sorted(max_detections) != list(max_detections):
        raise ValueError(
            f"max_detections={tuple(max_detections)}; AP is taken at 100: give rising numbers with 100"
        )
    _check(ground_truth, detections)
    precision = _precision(_coco(ground_truth), detections, max_detections, areas=4)
    hundred, last = list(max_detections).index(100), len(max_detections) - 1
    return CocoStats(
        ap=_mean(precision[:, :, :, 0, hundred]),
        ap50=_mean(precision[0, :, :, 0, last]),
        ap75=_mean(precision[5, :, :, 0, last]),
        small=_mean(precision[:, :, :, 1, last]),
        medium=_mean(precision[:, :, :, 2, last]),
        large=_mean(precision[:, :, :, 3, last]),
    )


def order_spread(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    max_detections: Sequence[int] = ODINW_LIMITS,
    *,
    orders: int = ORDERS,
    seed: int = 0,
) -> list[float | None]:
    """AP of the list as given and in ``orders`` random orders.

    Where all scores are equal nothing but the place in the list says which box comes first, and AP moves
    with it. The order of the pictures stays, it is that of their ids. The same seed gives the same orders.
    """
    _check(ground_truth, detections)
    truth = _coco(ground_truth)
    hundred = list(max_detections).index(100)
    generator = random.Random(seed)
    shuffled = list(detections)
    found = []
    for turn in range(orders + 1):
        if turn:
            generator.shuffle(shuffled)
        found.append(_mean(_precision(truth, shuffled, max_detections, areas=1)[:, :, :, 0, hundred]))
    return found


def mean_ap(parts: Iterable[float | None]) -> float | None:
    """ODinW's mean over its sets, each rounded to 3 places before; a set without truth does not enter."""
    known = [round(part, 3) for part in parts if part is not None]
    return statistics.fmean(known) if known else None


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    union = one[2] * one[3] + other[2] * other[3] - common
    return common / union if union > 0 else 0.0


def all_matched(truth: Sequence[LabelledBox], found: Sequence[LabelledBox], threshold: float = 0.5) -> bool:
    """Whether boxes and truth pair one to one, same label and IoU of ``threshold``, nothing left over.

    Crowds are left out of the truth.
    """
    wanted = [one for one in truth if not one.crowd]
    if len(wanted) != len(found):
        return False
    fits = [
        [
            place
            for place, box in enumerate(found)
            if _name(box.label) == _name(one.label) and iou(box.box, one.box) >= threshold
        ]
        for one in wanted
    ]
    owner: dict[int, int] = {}

    def place_for(one: int, tried: set[int]) -> bool:
        for place in fits[one]:
            if place not in tried:
                tried.add(place)
                if place not in owner or place_for(owner[place], tried):
                    owner[place] = one
                    return True
        return False

    return all(place_for(one, set()) for one in range(len(wanted)))


def _name(label: str) -> str:
    return label.strip().lower()


def _check(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> None:
    for key, known in (("image_id", "images"), ("category_id", "categories")):
        ids = {entry["id"] for entry in ground_truth[known]}
        for place, one in enumerate(detections):
            if one[key] not in ids:
                raise ValueError(f"detection {place}: {key}={one[key]!r} is none of the {known} of the truth")


def _coco(ground_truth: Mapping[str, Any]) -> Any:
    from faster_coco_eval import COCO

    # an annotation whose id is 0 would count as not found
    annotations = [{**one, "id": place} for place, one in enumerate(ground_truth["annotations"], 1)]
    return COCO({**ground_truth, "annotations": annotations})


def _precision(truth: Any, detections: Sequence[Mapping[str, Any]], limits: Sequence[int], areas: int) -> Any:
    """[10 IoUs, 101 recalls, categories, areas (all, small, medium, large), limits]; -1 without truth."""
    from faster_coco_eval import COCOeval_faster

    evaluation = COCOeval_faster(truth, truth.loadRes([dict(one) for one in detections]), "bbox")
    evaluation.params.maxDets = list(limits)
    evaluation.params.areaRng = evaluation.params.areaRng[:areas]
    evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:areas]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"]


def _mean(precision: Any) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
