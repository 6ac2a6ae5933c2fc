"""From a model's answer to the places it names, however badly it is written.

answer --thinking and tool calls blanked--> text --loose_json.read--> dicts --by their keys--> Box, Point, ...
                                                --markup------------> old tokens, <points>, HTML, Markdown

Each function returns `Parsed`: the items, and whether the answer was cut off, mended or in part unusable.
None raises for anything an answer may hold, evaluates it, or takes longer than in proportion to its length.

What is mended is counted by kind in `Parsed.repairs`: corners or ends in the wrong order are swapped, numbers
in quotes are read. An item with another count of numbers, or with one that is not finite, is dropped and
reported. Text up to the last `</think>` is not part of the answer.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from . import loose_json, markup
from .places import BOX_3D_NUMBERS, Box, Box3D, Element, Parsed, Point, Span, ToolCall
from .report import Report

BOX_KEYS = ("bbox_2d", "bbox")
POINT_KEYS = ("point_2d", "point")
BOX_3D_KEYS = ("bbox_3d",)
LABEL_KEYS = ("label", "text_content", "text", "name", "description", "caption")
"""The first of these that holds text is an item's label."""

START_KEYS, END_KEYS = ("start", "start_time"), ("end", "end_time")

_CLOCK = re.compile(r"(?:([0-9]{1,4}):)?([0-9]{1,5}):([0-9]{1,2}(?:[.,][0-9]{1,9})?)\Z")
_SECONDS = re.compile(r"(.{1,40}?) ?(?:s|secs?|seconds?)?\Z")
_TOOL_CALL = re.compile(r"<tool_call>([\s\S]*?)(</tool_call>|\Z)")

Item = TypeVar("Item")
Place = TypeVar("Place", Box, Point, Box3D)
Read = Callable[[loose_json.Found, Report], Iterator[Item]]


def parse_boxes(text: str, *, keys: Sequence[str] = BOX_KEYS, bare: bool = False) -> Parsed[Box]:
    """Rectangles: `{"bbox_2d": [x1, y1, x2, y2], "label": ...}` and Qwen2-VL's `<|box_start|>` tokens.

    The numbers are corners, x first, whatever the key. With `bare` a list of four numbers that no key holds
    counts too.
    """
    answer, report = _answer(text)
    found = _from_json(answer, report, lambda one, report: _boxes(one, report, keys, bare=bare))
    return report.result([*found, *markup.boxes(answer, report)])


def parse_points(text: str, *, keys: Sequence[str] = POINT_KEYS, bare: bool = False) -> Parsed[Point]:
    """Points: `{"point_2d": [x, y], "label": ...}`, `<points x1= y1= ...>` and `<|point_start|>` tokens.

    With `bare` a list of two numbers that no key holds counts too.
    """
    answer, report = _answer(text)
    found = _from_json(answer, report, lambda one, report: _points(one, report, keys, bare=bare))
    return report.result([*found, *markup.points(answer, report)])


def parse_boxes_3d(text: str, *, keys: Sequence[str] = BOX_3D_KEYS) -> Parsed[Box3D]:
    """Cuboids: `{"bbox_3d": [x, y, z, x_size, y_size, z_size, roll, pitch, yaw], "label": ...}`.

    Metres before the camera and angles in units of pi, as `Box3D` says.
    """
    answer, report = _answer(text)
    return report.result(_from_json(answer, report, lambda one, report: _boxes_3d(one, report, keys)))


def parse_places(text: str) -> Parsed[Box | Point | Box3D]:
    """Rectangles, points and cuboids together, in the order in which they begin."""

    def places(one: loose_json.Found, report: Report) -> Iterator[Box | Point | Box3D]:
        yield from _boxes(one, report, BOX_KEYS)
        yield from _points(one, report, POINT_KEYS)
        yield from _boxes_3d(one, report, BOX_3D_KEYS)

    answer, report = _answer(text)
    found: list[tuple[int, Box | Point | Box3D]] = list(_from_json(answer, report, places))
    found += markup.boxes(answer, report)
    found += markup.points(answer, report)
    return report.result(found)


def parse_spans(text: str) -> Parsed[Span]:
    """Stretches of a video: `{"start": ..., "end": ...}` or `start_time` with `end_time`.

    A time is a number of seconds, or text: "12.5", "12.5 s", "01:02.50" (mm:ss) or "1:01:02" (h:mm:ss).
    """
    answer, report = _answer(text)
    return report.result(_from_json(answer, report, _spans))


def parse_html(text: str) -> Parsed[Element]:
    """QwenVL HTML: every element with `data-bbox="x1 y1 x2 y2"`; its box is labelled with its class or tag.

    An attribute must not hold a bare < or >. An element that was not closed at the end is dropped.
    """
    answer, report = _answer(text)
    return report.result(markup.html_elements(answer, report))


def parse_markdown(text: str) -> Parsed[Element]:
    """QwenVL Markdown: every `<!-- Table (x1, y1, x2, y2) -->` with the block that it stands before.

    A block is a LaTeX environment or goes on to the next blank line; that of an image is its `![...]` line,
    if there is one. A LaTeX environment that was not closed is dropped.
    """
    answer, report = _answer(text)
    return report.result(markup.markdown_elements(answer, report))


def parse_tool_calls(text: str) -> Parsed[ToolCall]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; arguments also as JSON in text."""
    answer, report = _answer(text, tool_calls=True)
    found: list[tuple[int, ToolCall]] = []
    for block in _TOOL_CALL.finditer(answer):
        loose = loose_json.read(block[1])
        report.repairs |= loose.repairs
        report.truncated |= loose.truncated or not (block[2] or loose.found)
        calls = [one.value for one in loose.found if not one.depth and isinstance(one.value, Mapping)]
        if not block[2] and calls:
            report.repairs.add("missing end tag")
        if block[2] and not calls:
            report.drop("tool_call", block[1].strip(), "holds no JSON object")
        found += [(block.start(), call) for one in calls for call in _tool_call(one, report)]
    return report.result(found)


def _answer(text: str, *, tool_calls: bool = False) -> tuple[str, Report]:
    """`text` with thinking, and unless asked for also tool calls, replaced by as many spaces."""
    report = Report()
    thought = text.rfind("</think>") + len("</think>")
    if thought >= len("</think>"):
        text = " " * thought + text[thought:]
    unfinished = text.find("<think>")
    if unfinished >= 0:
        text, report.truncated = text[:unfinished], True
    if not tool_calls and "<tool_call>" in text:
        text = _TOOL_CALL.sub(lambda block: " " * len(block[0]), text)
    return text, report


def _from_json(text: str, report: Report, read: Read[Item]) -> list[tuple[int, Item]]:
    loose = loose_json.read(text)
    report.repairs |= loose.repairs
    report.truncated |= loose.truncated
    return [(one.start, item) for one in loose.found for item in read(one, report)]


def _boxes(
    one: loose_json.Found, report: Report, keys: Sequence[str], *, bare: bool = False
) -> Iterator[Box]:
    for numbers, label, extra in _numbers(one, report, keys, 4, bare=bare):
        yield report.box(numbers, label, extra)


def _points(
    one: loose_json.Found, report: Report, keys: Sequence[str], *, bare: bool = False
) -> Iterator[Point]:
    for (x, y), label, extra in _numbers(one, report, keys, 2, bare=bare):
        yield Point(x=x, y=y, label=label, extra=extra)


def _boxes_3d(one: loose_json.Found, report: Report, keys: Sequence[str]) -> Iterator[Box3D]:
    for numbers, label, extra in _numbers(one, report, keys, 9, bare=False):
        if min(numbers[3:6]) < 0:
            report.drop("bbox_3d", numbers, "has a negative size")
            continue
        yield Box3D(**dict(zip(BOX_3D_NUMBERS, numbers, strict=True)), label=label, extra=extra)


def _numbers(
    one: loose_json.Found, report: Report, keys: Sequence[str], count: int, *, bare: bool
) -> Iterator[tuple[list[float], str, dict[str, Any]]]:
    """(numbers, label, extra) for each group of `count` numbers under the first of `keys` that is there."""
    if not isinstance(one.value, Mapping):
        if bare and len(one.value) == count:
            numbers = report.numbers("list", one.value, count)
            if numbers is not None:
                yield numbers, "", {}
        return
    key = next((key for key in keys if key in one.value), None)
    if key is None:
        return
    label, extra = _label(one.value, (key,))
    for group in _groups(one.value[key], report):
        numbers = report.numbers(key, group, count)
        if numbers is not None:
            yield numbers, label, dict(extra)


def _groups(value: Any, report: Report) -> Iterator[Any]:
    """The innermost lists of `value`; text such as "1, 2, 3, 4" is a list too. No deeper than MAX_DEPTH."""
    if isinstance(value, str):
        report.repairs.add("number as text")
        yield [part for part in re.split(r"[\s,()\[\]]+", value) if part]
    elif isinstance(value, list) and any(isinstance(one, list) for one in value):
        for one in value:
            yield from _groups(one, report)
    else:
        yield value


def _label(item: Mapping[str, Any], used: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """(label, everything else)."""
    name = next((key for key in LABEL_KEYS if isinstance(item.get(key), str)), None)
    extra = {key: value for key, value in item.items() if key not in used and key != name}
    return ("" if name is None else item[name]), extra


def _spans(one: loose_json.Found, report: Report) -> Iterator[Span]:
    if not isinstance(one.value, Mapping):
        return
    keys = [next((key for key in names if key in one.value), None) for names in (START_KEYS, END_KEYS)]
    if None in keys:
        return
    times = [_seconds(one.value[key]) for key in keys if key is not None]
    start, end = times
    if start is None or end is None:
        report.drop(
            "span", [one.value[key] for key in keys if key], "is no time in seconds, mm:ss or h:mm:ss"
        )
        return
    if start > end:
        report.repairs.add("swapped ends")
        start, end = end, start
    label, extra = _label(one.value, [key for key in keys if key])
    yield Span(start=start, end=end, label=label, extra=extra)


def _seconds(value: Any) -> float | None:
    """Seconds, or None for what is no time."""
    if isinstance(value, str):
        clock = _CLOCK.match(value.strip())
        if clock:
            hours, minutes, seconds = clock.groups()
            return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
        seconds = _SECONDS.match(value.strip())
        value = loose_json.number(seconds[1]) if seconds else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _tool_call(call: Mapping[str, Any], report: Report) -> Iterator[ToolCall]:
    name, arguments = call.get("name"), call.get("arguments", {})
    if isinstance(arguments, str):
        within = loose_json.read(arguments)
        report.repairs |= within.repairs
        whole = [one.value for one in within.found if not one.depth and not within.truncated]
        arguments = whole[0] if len(whole) == 1 else arguments
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        report.drop("tool_call", call, "needs a name in text and arguments in an object")
        return
    yield ToolCall(name=name, arguments=arguments)
