"""ODinW-13, object detection in the wild (Li et al. 2022, ELEVATER): boxes of named things, in 13 sets.

    data/NAME/.../annotations_without_background.json -> one question a picture, all categories of its set
        -> answer -> boxes in pixels of the original picture -> AP of each set -> their mean

The rule is COCO's with every score 1 and 100, 300 and 1000 boxes, see ``qwenvl_eval.scoring.detection``.
Which coordinates a model speaks is declared by ``coordinates`` and never guessed from its answers.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from qwen_vl_serve import Sampling
from qwen_vl_utils.grounding import Box, parse_boxes, resized_size, to_original
from qwenvl_eval.presets import INSTRUCT, THINK
from qwenvl_eval.scoring import Outcome, Scorer, Verdict
from qwenvl_eval.scoring.detection import (
    ODINW_LIMITS,
    ORDERS,
    CocoInput,
    LabelledBox,
    Picture,
    all_matched,
    coco_dicts,
    coco_stats,
    mean_ap,
    order_spread,
)
from qwenvl_eval.task import Dataset, Judged, Metric, Sample, Task, option

MIN_PIXELS = 768 * 32 * 32
MAX_PIXELS = 12800 * 32 * 32
"""Of the published run of Qwen3-VL."""

COORDINATES = ("relative1000", "absolute")

FAR = 1e6
"""A coordinate beyond is no place in a picture."""

_NO_BOXES = re.compile(r"\[\s*\]")


@dataclass(frozen=True)
class OdinwSet:
    """One of the 13: where its annotations and its pictures lie in the data folder."""

    name: str
    ann_file: str
    img_prefix: str


def _set(folder: str, split: str = "valid/") -> OdinwSet:
    name = folder.partition("/")[0]
    return OdinwSet(name, f"{folder}/{split}annotations_without_background.json", f"{folder}/{split}")


SETS = (
    _set("AerialMaritimeDrone/large"),
    _set("Aquarium/Aquarium Combined.v2-raw-1024.coco"),
    _set("CottontailRabbits"),
    _set("EgoHands/generic"),
    _set("NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco"),
    _set("Packages/Raw"),
    _set("PascalVOC"),
    OdinwSet("pistols", "pistols/export/val_annotations_without_background.json", "pistols/export/"),
    _set("pothole"),
    _set("Raccoon/Raccoon.v2-raw.coco"),
    _set("ShellfishOpenImages/raw"),
    _set("thermalDogsAndPeople"),
    _set("VehiclesOpenImages/416x416"),
)
"""The validation splits that the published numbers are of, as ODinW lays them out."""


LONGEST = 300_000
"""Characters of an answer that are read: more than 40,960 tokens of boxes have."""


def boxes(answer: str, target: Mapping[str, Any]) -> Verdict:
    """An answer's boxes in ``extracted``, as JSON: ``[{"label", "bbox": [x, y, width, height]}]`` [pixels].

    RIGHT where truth and boxes pair one to one with the same label and an IoU of .5, and nothing is left
    over; UNPARSED where there is neither a box nor an empty list. Of a list that was cut off its whole items
    count, of one with a bad item the others. ``target``: ``height`` and ``width`` [pixels] of the picture,
    ``resized`` the same of what the model saw or None where coordinates are relative, ``truth``, a list as
    above.
    """
    answer = answer[:LONGEST]
    parsed = parse_boxes(answer)
    said = answer.rpartition("</think>")[2].partition("<think>")[0]
    if not parsed.items and not parsed.dropped and not _NO_BOXES.search(said):
        return Verdict(Outcome.UNPARSED)
    near = [box for box in parsed.items if max(map(abs, box.xyxy)) <= FAR]
    found = [_placed(box, target) for box in near]
    unusable = len(parsed.dropped) + len(parsed.items) - len(near)
    right = not unusable and all_matched(_labelled(target["truth"]), _labelled(found))
    return Verdict(Outcome.RIGHT if right else Outcome.WRONG, json.dumps(found, ensure_ascii=False))


def official(answer: str, target: Mapping[str, Any]) -> Verdict:
    """As the published script reads an answer: all of it is one Python or JSON literal, or it holds nothing.

    A fence is taken off first. An item without four numbers is skipped, one without a label takes all with
    it; labels that are no category are left out. Where that script would stop with an error it is UNPARSED.
    Verdict and ``target`` as in :func:`boxes`.
    """
    said = answer.rpartition("</think>")[2].strip().replace("```json", "").replace("```", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            items = ast.literal_eval(said)
        named = [(one["bbox_2d"], one["label"]) for one in items if len(one.get("bbox_2d", [])) == 4]
        known = {name.lower() for name in target["categories"]}
        found = [_scaled(corners, label, target) for corners, label in named if label.lower() in known]
    except (ValueError, TypeError, SyntaxError, KeyError, AttributeError, MemoryError, RecursionError):
        return Verdict(Outcome.UNPARSED)
    right = all_matched(_labelled(target["truth"]), _labelled(found))
    return Verdict(Outcome.RIGHT if right else Outcome.WRONG, json.dumps(found, ensure_ascii=False))


@dataclass(frozen=True)
class Odinw(Task):
    """Detection by naming boxes."""

    title: ClassVar[str] = "ODinW-13"
    protocols: ClassVar[Mapping[str, Scorer]] = {"boxes": boxes, "official": official}
    tables: ClassVar[tuple[tuple[str, ...], ...]] = (("dataset",),)
    presets: ClassVar[Mapping[str, Sampling]] = {"instruct": INSTRUCT, "think": THINK}

    datasets: str = option("", "names of some of the 13 sets, with commas between (all 13 where not given)")
    coordinates: str = option(
        "relative1000",
        "relative1000 (Qwen3-VL: 0 to 1000) or absolute (Qwen2.5-VL: pixels of the resized picture)",
    )
    min_pixels: int = option(MIN_PIXELS, "fewest pixels of a picture; 0 leaves it to the checkpoint")
    max_pixels: int = option(MAX_PIXELS, "most pixels of a picture; 0 leaves it to the checkpoint")

    def __post_init__(self) -> None:
        if self.coordinates not in COORDINATES:
            raise ValueError(f"coordinates={self.coordinates!r}; give one of {', '.join(COORDINATES)}")
        if self.coordinates == "absolute" and not (self.min_pixels and self.max_pixels):
            raise ValueError(
                f"min_pixels={self.min_pixels} and max_pixels={self.max_pixels} with absolute coordinates: "
                "name both, the pixels of the resized picture follow from them"
            )
        self._chosen()

    def open(self, data: Path) -> Dataset:
        """``data``: the folder that holds AerialMaritimeDrone and the others.

        Each annotation file is read once here, and once more when its questions are asked. Raises ValueError
        naming what is not there or not as published.
        """
        missing = [one.ann_file for one in self._chosen() if not (data / one.ann_file).is_file()]
        if missing:
            raise ValueError(
                f"{data / missing[0]}: no such file ({len(missing)} of {len(self._chosen())} sets are not "
                "there); put ODinW-13 there as published, or name those that you have with --datasets"
            )
        size = sum(1 for one in self._chosen() for _ in self._samples(data, one))
        files = tuple(data / one.ann_file for one in self._chosen())
        return Dataset(
            files, size, lambda: (sample for one in self._chosen() for sample in self._samples(data, one))
        )

    def metrics(self, protocol: str, judged: Sequence[Judged]) -> list[Metric]:
        """Mean AP first. Of several replicates each figure is the mean."""
        inputs = _inputs(judged)
        stats = {
            name: [coco_stats(*_both(one), ODINW_LIMITS) for one in each] for name, each in inputs.items()
        }
        aps = {name: [one.ap for one in each] for name, each in stats.items()}
        found = [
            _mean_metric("mAP", aps, _sets(aps)),
            *_spread(inputs),
            _mean_metric("mAP_50", {name: [one.ap50 for one in each] for name, each in stats.items()}),
            _mean_metric("mAP_75", {name: [one.ap75 for one in each] for name, each in stats.items()}),
            _unknown(inputs),
        ]
        return [metric for metric in found if metric is not None]

    def _chosen(self) -> list[OdinwSet]:
        names = [name.strip() for name in self.datasets.split(",") if name.strip()]
        known = {one.name: one for one in SETS}
        for name in names:
            if name not in known:
                raise ValueError(f"datasets: no set is called {name!r}; there are {', '.join(known)}")
        return [one for one in SETS if not names or one.name in names]

    def _samples(self, data: Path, one: OdinwSet) -> Iterator[Sample]:
        pictures = Annotations(data / one.ann_file)
        question = _question(pictures.names)
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        limits = {name: value for name, value in limits.items() if value}
        for entry in pictures.images:
            path = data / one.img_prefix / entry["file_name"]
            if not path.is_file():
                raise ValueError(f"{path}: no such file, but {pictures.path} names it; fetch the set again")
            height, width = entry["height"], entry["width"]
            resized = None
            if self.coordinates == "absolute":
                resized = resized_size(height=height, width=width, image_patch_size=14, item=limits)
            image = {"type": "image", "image": str(path), **limits}
            yield Sample(
                id=f"{one.name}/{entry['id']}",
                messages=[{"role": "user", "content": [image, {"type": "text", "text": question}]}],
                target={
                    "dataset": one.name,
                    "image_id": entry["id"],
                    "height": height,
                    "width": width,
                    "resized": list(resized) if resized else None,
                    "categories": pictures.names,
                    "truth": pictures.truth[entry["id"]],
                },
                cluster=f"{one.name}/{entry['file_name']}",
                groups={"dataset": one.name},
            )


class Annotations:
    """A COCO annotation file: ``images``, ``names`` of the categories and, by picture, the ``truth``.

    Raises ValueError naming file and entry for what COCO does not allow.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.images = [
                {
                    "id": int(image["id"]),
                    "file_name": str(image["file_name"]),
                    "height": int(image["height"]),
                    "width": int(image["width"]),
                }
                for image in content["images"]
            ]
            categories = {one["id"]: str(one["name"]) for one in content["categories"]}
            self.names = list(dict.fromkeys(categories.values()))
            self.truth: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
            for one in content["annotations"]:
                x, y, width, height = map(float, one["bbox"])
                crowd = {"crowd": True} if one.get("iscrowd") else {}
                label = categories[one["category_id"]]
                self.truth[one["image_id"]].append({"label": label, "bbox": [x, y, width, height], **crowd})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a COCO annotation file: {error!r}; fetch the set again") from error
        if not self.images or len(self.truth) < len(self.images):
            raise ValueError(f"{path}: {len(self.images)} pictures but {len(self.truth)} ids; fetch it again")


def _question(names: Sequence[str]) -> str:
    return (
        f"Locate every instance of these categories in the image: {', '.join(names)}. Output a JSON list "
        'with one item for each instance, {"bbox_2d": [x1, y1, x2, y2], "label": "name of the category"}, '
        "or [] if there is none."
    )


def _placed(box: Box, target: Mapping[str, Any]) -> dict[str, Any]:
    placed = to_original(
        box,
        coordinates="resized" if target["resized"] else "relative",
        height=target["height"],
        width=target["width"],
        resized=target["resized"],
    )
    return {"label": box.label, "bbox": [placed.x1, placed.y1, placed.x2 - placed.x1, placed.y2 - placed.y1]}


def _scaled(corners: Sequence[Any], label: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """Corners as they are, in the wrong order too. Raises ValueError or TypeError for what is no number."""
    rows, columns = target["resized"] or (1000, 1000)
    x1, x2 = (value / columns * target["width"] for value in corners[::2])
    y1, y2 = (value / rows * target["height"] for value in corners[1::2])
    box = [x1, y1, x2 - x1, y2 - y1]
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{corners} are no place in a picture")
    return {"label": label, "bbox": box}


def _labelled(found: Sequence[Mapping[str, Any]]) -> list[LabelledBox]:
    return [LabelledBox(one["label"], tuple(one["bbox"]), one.get("crowd", False)) for one in found]


def _inputs(judged: Sequence[Judged]) -> dict[str, list[CocoInput]]:
    """By set, in the order of the table: COCO's input for each replicate. No answer is no boxes."""
    pictures: defaultdict[tuple[str, int], list[Picture]] = defaultdict(list)
    categories: dict[str, Sequence[str]] = {}
    for one in judged:
        name, found = one.target["dataset"], json.loads(one.verdict.extracted or "[]")
        categories[name] = one.target["categories"]
        pictures[name, one.replicate].append(
            Picture(one.target["image_id"], _labelled(one.target["truth"]), _labelled(found))
        )
    return {
        one.name: [
            coco_dicts(pictures[key], categories[one.name]) for key in sorted(pictures) if key[0] == one.name
        ]
        for one in SETS
        if one.name in categories
    }


def _both(one: CocoInput) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    return one.ground_truth, one.detections


def _mean_metric(name: str, parts: Mapping[str, Sequence[float | None]], note: str = "") -> Metric | None:
    """The mean over sets, of each replicate and then over those; None where no set has truth."""
    means = [mean_ap(replicate) for replicate in zip(*parts.values(), strict=True)]
    known = [mean for mean in means if mean is not None]
    if not known:
        return None
    rounded = {
        each: [round(value, 3) for value in values if value is not None] for each, values in parts.items()
    }
    shown = {each: fmean(values) for each, values in rounded.items() if values}
    return Metric(name, fmean(known), note, shown)


def _sets(parts: Mapping[str, Sequence[float | None]]) -> str:
    """Of how many sets the mean is, and which are missing."""
    missing = [one.name for one in SETS if set(parts.get(one.name, ())) <= {None}]
    if not missing:
        return f"mean of {len(SETS)} sets"
    return f"mean of {len(SETS) - len(missing)} of {len(SETS)} sets; missing: {', '.join(missing)}"


def _spread(inputs: Mapping[str, Sequence[CocoInput]]) -> list[Metric | None]:
    """The lowest and the highest mean AP over orders of the boxes, the model's own included."""
    values = {name: [order_spread(*_both(one)) for one in each] for name, each in inputs.items()}
    means = []
    for order in range(ORDERS + 1):
        parts = {name: [one[order] for one in each] for name, each in values.items()}
        if (metric := _mean_metric("", parts)) is not None:
            means.append(metric)
    if not means:
        return []
    note = f"of {ORDERS + 1} orders of an answer's boxes, the model's own and random ones"
    lowest, highest = min(means, key=lambda one: one.value), max(means, key=lambda one: one.value)
    return [
        Metric("mAP, worst list order", lowest.value, note, lowest.parts),
        Metric("mAP, best list order", highest.value, note, highest.parts),
    ]


def _unknown(inputs: Mapping[str, Sequence[CocoInput]]) -> Metric | None:
    """How many boxes have a label that is no category of their set."""
    if not inputs:
        return None
    labels: Counter[str] = Counter()
    parts = {name: float(sum(one.unknown.total() for one in each)) for name, each in inputs.items()}
    for each in inputs.values():
        for one in each:
            labels += one.unknown
    common = ", ".join(repr(label) for label, _ in labels.most_common(5))
    note = f"left out; the most frequent: {common}" if common else "none"
    return Metric("boxes with an unknown label", float(labels.total()), note, parts)
