"""How nanobench scores an answer: a share from 0 to 1, by the metric of the skill.

Every metric takes the answer and a target that holds the wanted ``answer`` and what else the metric names.
An answer that is not in the published form (JSON, a ``<tool_call>``, QwenVL HTML, SVG) scores 0: nothing is
mended. Coordinates are those of Qwen3-VL, 0 to 1000.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenvl_eval.scoring.exact import exact_match
from qwenvl_eval.scoring.text import box_iou, edit_similarity
from qwenvl_eval.scoring.verdict import Outcome, Verdict

IOU = 0.5  # of boxes, spans and cuboids that are taken for the same
SIMILAR = 0.8  # of a document's texts that are taken for the same
LONGEST = 4000  # characters of an answer that are read

Metric = Callable[[str, Mapping[str, Any]], float]

_FENCE = re.compile(r"\A```(?:json|html|svg|markdown)?\n(.*?)\n?```\Z", re.DOTALL)
_CALL = re.compile(r"\A<tool_call>(.*)</tool_call>\Z", re.DOTALL)


def exact(answer: str, target: Mapping[str, Any]) -> float:
    """1 for the text ``answer``, see :func:`~qwenvl_eval.scoring.exact_match`."""
    return float(exact_match(answer, target["answer"]))


def edit(answer: str, target: Mapping[str, Any]) -> float:
    """1 - Levenshtein distance to ``answer`` over the length of the longer text."""
    return edit_similarity(answer.strip()[:LONGEST], target["answer"])


def box(answer: str, target: Mapping[str, Any]) -> float:
    """1 where the only box overlaps the only one of ``boxes`` with an IoU of 0.5 or more."""
    found = _under("bbox_2d", 4, answer)
    return float(len(found) == 1 and box_iou(found[0], target["boxes"][0]) >= IOU)


def boxes(answer: str, target: Mapping[str, Any]) -> float:
    """F1 of boxes paired with ``boxes`` one to one at an IoU of 0.5, the best overlaps first."""
    return _f1(_under("bbox_2d", 4, answer), target["boxes"], box_iou, IOU)


def point(answer: str, target: Mapping[str, Any]) -> float:
    """1 where the only point lies in ``box``."""
    found = _under("point_2d", 2, answer)
    return float(len(found) == 1 and _inside(found[0], target["box"]))


def click(answer: str, target: Mapping[str, Any]) -> float:
    """1 for the tool call of ``answer``, its ``coordinate`` anywhere in ``box``."""
    found, wanted = _tool_call(answer), _tool_call(target["answer"])
    if found is None or wanted is None or found["name"] != wanted["name"]:
        return 0.0
    rest, place = _without(found["arguments"], "coordinate")
    right = rest == _without(wanted["arguments"], "coordinate")[0]
    numbers = _numbers(place, 2)
    return float(right and numbers is not None and _inside(numbers, target["box"]))


def zoom(answer: str, target: Mapping[str, Any]) -> float:
    """1 for a call of the tool of ``answer`` whose ``bbox_2d`` holds all of ``box`` and is no more than
    ``most`` of the picture's area.
    """
    found, wanted = _tool_call(answer), _tool_call(target["answer"])
    if found is None or wanted is None or found["name"] != wanted["name"]:
        return 0.0
    region = _numbers(found["arguments"].get("bbox_2d"), 4)
    if region is None:
        return 0.0
    inner = target["box"]
    holds = (
        region[0] <= inner[0] and region[1] <= inner[1] and region[2] >= inner[2] and region[3] >= inner[3]
    )
    return float(holds and (region[2] - region[0]) * (region[3] - region[1]) <= target["most"] * 1e6)


def fields(answer: str, target: Mapping[str, Any]) -> float:
    """F1 of the fields of a flat JSON object: a field is right where name and text are those of
    ``answer``.
    """
    found, wanted = _object(answer), _object(target["answer"])
    if not found or not wanted:
        return 0.0
    right = sum(exact_match(str(found[name]), str(text)) for name, text in wanted.items() if name in found)
    return 2 * right / (len(found) + len(wanted))


def span(answer: str, target: Mapping[str, Any]) -> float:
    """1 where the only ``{"start": .., "end": ..}`` overlaps ``span``, in seconds, with an IoU of 0.5 or
    more.
    """
    found = _object(answer)
    times = None if found is None else _numbers([found.get("start"), found.get("end")], 2)
    if times is None or times[0] >= times[1]:
        return 0.0
    start, end = target["span"]
    both = min(times[1], end) - max(times[0], start)
    return float(both > 0 and both / (max(times[1], end) - min(times[0], start)) >= IOU)


def cuboid(answer: str, target: Mapping[str, Any]) -> float:
    """1 where the only ``bbox_3d`` has its centre within a quarter of the distance of ``cuboid``'s from the
    camera, every side within half of its length, and the same label as ``answer``.
    """
    found, wanted = _items(answer), _items(target["answer"])
    numbers = _under("bbox_3d", 9, answer)
    if len(numbers) != 1 or found[0].get("label") != wanted[0].get("label"):
        return 0.0
    own, other = numbers[0], target["cuboid"]
    near = math.dist(own[:3], other[:3]) <= 0.25 * math.hypot(*other[:3])
    return float(near and all(abs(a - b) <= 0.5 * b for a, b in zip(own[3:6], other[3:6], strict=True)))


def document(answer: str, target: Mapping[str, Any]) -> float:
    """F1 of the elements of QwenVL HTML or Markdown: kind the same, boxes at an IoU of 0.5, texts
    0.8 alike.
    """
    return _f1(_elements(answer[:LONGEST]), _elements(target["answer"]), _same_element, 1.0)


def drawing(answer: str, target: Mapping[str, Any]) -> float:
    """F1 of the shapes of an SVG: tag and fill the same, outer boxes at an IoU of 0.5."""
    return _f1(_drawn(answer[:LONGEST]), _drawn(target["answer"]), _same_drawn, 1.0)


METRICS: Mapping[str, Metric] = {
    metric.__name__: metric
    for metric in (
        exact, edit, box, boxes, point, click, zoom, fields, span, cuboid, document, drawing,
    )
}  # fmt: skip


def graded(answer: str, target: Mapping[str, Any]) -> Verdict:
    """The metric that ``target["metric"]`` names; right where it gives 1."""
    if not answer.strip():
        return Verdict(Outcome.UNPARSED, score=0.0)
    score = METRICS[target["metric"]](answer, target)
    return Verdict(Outcome.RIGHT if score == 1 else Outcome.WRONG, answer.strip()[:200], score=score)


def _json(text: str) -> Any:
    """The whole text as JSON, in a fence or not; None where it is none."""
    text = text.strip()[:LONGEST]
    fenced = _FENCE.match(text)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):  # the model's mistake
        return None


def _object(text: str) -> dict[str, Any] | None:
    found = _json(text)
    return found if isinstance(found, dict) else None


def _items(text: str) -> list[dict[str, Any]]:
    found = _json(text)
    listed = found if isinstance(found, list) else [found]
    return [item for item in listed if isinstance(item, dict)]


def _numbers(value: Any, count: int) -> list[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in value):
        return None
    return [float(one) for one in value] if all(abs(one) < 1e6 for one in value) else None


def _under(key: str, count: int, text: str) -> list[list[float]]:
    found = (_numbers(item.get(key), count) for item in _items(text))
    return [numbers for numbers in found if numbers is not None]


def _inside(place: Sequence[float], area: Sequence[float]) -> bool:
    return area[0] <= place[0] <= area[2] and area[1] <= place[1] <= area[3]


def _tool_call(text: str) -> dict[str, Any] | None:
    call = _CALL.match(text.strip()[:LONGEST])
    found = _object(call[1]) if call else None
    return found if found and isinstance(found.get("arguments"), dict) and "name" in found else None


def _without(arguments: Mapping[str, Any], name: str) -> tuple[dict[str, Any], Any]:
    return {key: value for key, value in arguments.items() if key != name}, arguments.get(name)


def _f1(
    found: Sequence[Any], wanted: Sequence[Any], alike: Callable[[Any, Any], float], least: float
) -> float:
    """F1 of pairs that are ``least`` alike or more, each one in one pair at most, the most alike first."""
    found = found[:100]
    pairs = sorted(
        ((alike(one, other), a, b) for a, one in enumerate(found) for b, other in enumerate(wanted)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    used: tuple[set[int], set[int]] = (set(), set())
    for likeness, a, b in pairs:
        if likeness >= least and a not in used[0] and b not in used[1]:
            used[0].add(a)
            used[1].add(b)
    return 2 * len(used[0]) / (len(found) + len(wanted)) if found else 0.0


_HTML = re.compile(r'<(\w+) data-bbox="([\d ]{7,40})">(.*?)</\1>', re.DOTALL)
_MARKDOWN = re.compile(r"<!-- (\w+) \(([\d, ]{7,40})\) -->\n(.*?)(?=\n\n|\Z)", re.DOTALL)
Element = tuple[str, list[float], str]


def _elements(text: str) -> list[Element]:
    """(kind, box, text) of each element; a table's text keeps its tags."""
    found = [*_HTML.findall(text), *_MARKDOWN.findall(text)]
    places = [[float(number) for number in re.findall(r"\d+", place)] for _, place, _ in found]
    return [
        (kind.lower(), place, " ".join(inner.split()))
        for (kind, _, inner), place in zip(found, places, strict=True)
        if len(place) == 4
    ]


def _same_element(one: Element, other: Element) -> float:
    same = one[0] == other[0] and box_iou(one[1], other[1]) >= IOU
    return float(same and edit_similarity(one[2], other[2]) >= SIMILAR)


_SHAPE = re.compile(r"<(rect|circle|ellipse|polygon)((?: [\w-]+=\"[^\"<>]*\")+) ?/>")
_ATTRIBUTE = re.compile(r"([\w-]+)=\"([^\"<>]*)\"")
Drawn = tuple[str, str, list[float]]


def _drawn(text: str) -> list[Drawn]:
    """(tag, fill, outer box) of each shape whose numbers are numbers."""
    found = []
    for tag, attributes in _SHAPE.findall(text):
        values = dict(_ATTRIBUTE.findall(attributes))
        if (outer := _outer(tag, values)) is not None:
            found.append((tag, values.get("fill", ""), outer))
    return found


def _outer(tag: str, values: Mapping[str, str]) -> list[float] | None:
    names = {
        "rect": ("x", "y", "width", "height"),
        "circle": ("cx", "cy", "r"),
        "ellipse": ("cx", "cy", "rx", "ry"),
    }
    texts = re.split(r"[ ,]+", values.get("points", "")) if tag == "polygon" else [
        values.get(name, "") for name in names[tag]
    ]  # fmt: skip
    if len(texts) > 40 or not all(re.fullmatch(r"-?\d{1,5}(\.\d{1,3})?", text) for text in texts):
        return None
    numbers = [float(text) for text in texts]
    if tag == "polygon":
        xs, ys = numbers[::2], numbers[1::2]
        return [min(xs), min(ys), max(xs), max(ys)] if len(xs) == len(ys) else None
    if tag == "rect":
        x, y, width, height = numbers
        return [x, y, x + width, y + height]
    x, y, rx, ry = (*numbers, numbers[2])[:4]
    return [x - rx, y - ry, x + rx, y + ry]


def _same_drawn(one: Drawn, other: Drawn) -> float:
    return float(one[:2] == other[:2] and box_iou(one[2], other[2]) >= IOU)
