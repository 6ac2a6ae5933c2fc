"""Places in markup: Qwen2-VL's tokens, <points>, QwenVL HTML and QwenVL Markdown.

text --a regular expression per kind that never looks past the next "<"--> marks --stack--> (start, item)

The functions add what they mended, dropped or found cut off to the report that they are given.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .loose_json import number
from .places import Box, Element, Point
from .report import Report

_MARK = re.compile(
    r"<\|(?P<token>object_ref|box|point)_(?P<side>start|end)\|>|<(?P<close>/?)(?P<old>ref|box)>"
)
_BETWEEN = re.compile(r"[\s,，;]*+\Z")
_SEPARATORS = re.compile(r"[\s,()\[\]]+")
_TAG = re.compile(
    r"<(?P<close>/?)(?P<name>[A-Za-z][A-Za-z0-9:-]*+)(?P<attributes>[^<>]*+)>|(?P<comment><!--)"
)
_ATTRIBUTE = re.compile(r"(?<![\w:-])([A-Za-z_][\w:-]*+)\s*+=\s*+(?:\"([^\"]*+)\"|'([^']*+)'|([^\s\"'>]++))")
_LONG_REFERENCE = re.compile(r"&(?=#[xX]?[0-9a-fA-F]{9})")
_PLACED = re.compile(r"<!--([^()<>]*+)\(([^()<>]*+)\)\s*+-->")
_ENVIRONMENT = re.compile(r"\\begin\{([A-Za-z]{1,40}\*?)\}")
_BLANK_LINE = re.compile(r"\n[ \t\r]*+\n")

VOID_TAGS = frozenset("area base br col embed hr img input link meta source track wbr".split())
INLINE_TAGS = frozenset("a b code em font i mark s small span strong sub sup u".split())


def boxes(text: str, report: Report) -> list[tuple[int, Box]]:
    """`<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>`, also <ref> and <box>.

    A name goes with all boxes that follow it without other text between.
    """
    found = []
    for start, content, label in _tokens(text, "box", report):
        numbers = report.numbers("box", _values(content), 4)
        if numbers is not None:
            found.append((start, report.box(numbers, label)))
    return found


def points(text: str, report: Report) -> list[tuple[int, Point]]:
    """`<|point_start|>(1,2)<|point_end|>` and `<points x1="1" y1="2" x2= ... alt="a cat">a cat</points>`."""
    found = []
    for start, content, label in _tokens(text, "point", report):
        numbers = report.numbers("point", _values(content), 2)
        if numbers is not None:
            found.append((start, Point(x=numbers[0], y=numbers[1], label=label)))
    return found + list(_point_tags(text, report))


def _tokens(text: str, kind: str, report: Report) -> Iterator[tuple[int, str, str]]:
    """(start, content, label) of each pair of marks of `kind`."""
    label, label_end = "", 0
    opened, start, begin = "", 0, 0
    for mark in _MARK.finditer(text):
        name = mark["token"] or {"ref": "object_ref", "box": "box"}[mark["old"]]
        if (mark["side"] or ("end" if mark["close"] else "start")) == "start":
            if opened:
                report.drop(opened, text[begin : mark.start()], "has no end mark")
            opened, start, begin = name, mark.start(), mark.end()
            continue
        if opened != name:
            report.repairs.add("stray end mark")
            continue
        content, opened = text[begin : mark.start()], ""
        if name == "object_ref":
            label, label_end = content.strip(), mark.end()
            continue
        # the slice is short or blank: it is looked at only as far as its first letter
        follows = label_end and _BETWEEN.match(text, label_end, start)
        label = label if follows else ""
        label_end = mark.end() if follows else 0
        if name == kind:
            yield start, content, label
    report.truncated |= bool(opened)


def _values(text: str) -> list[int | float | str]:
    """The numbers in "1 2 3 4" or "(1,2),(3,4)"; what is no number stays text."""
    found: list[int | float | str] = []
    for part in _SEPARATORS.split(text):
        value = number(part)
        if part:
            found.append(part if value is None else value)
    return found


def _attributes(text: str) -> dict[str, str]:
    found = _ATTRIBUTE.finditer(text)
    return {one[1].lower(): _plain(one[2] or one[3] or one[4] or "") for one in found}


def _plain(text: str) -> str:
    """`text` with references such as &lt; resolved, but for numbers too long to be a character."""
    return html.unescape(_LONG_REFERENCE.sub("&amp;", text))


def _point_tags(text: str, report: Report) -> Iterator[tuple[int, Point]]:
    at = 0
    while tag := _TAG.search(text, at):
        at = tag.end()
        if tag["comment"] or tag["close"] or tag["name"].lower() not in ("point", "points"):
            continue
        attributes = _attributes(tag["attributes"])
        closed = text.find("<", at)
        label = attributes.get("alt") or _plain(text[at : max(closed, at)]).strip()
        if not tag["attributes"].endswith("/"):
            if text[closed : closed + 2] != "</":
                if closed < 0:
                    report.truncated = True
                    return
                report.repairs.add("missing end tag")
            elif text.find(">", closed) < 0:
                report.truncated = True
                return
        for name in attributes:
            if name[0] == "x" and (name == "x" or name[1:].isdigit()):
                pair = [attributes[name], attributes.get("y" + name[1:], "")]
                numbers = report.numbers("points", [one for part in pair for one in _values(part)], 2)
                if numbers is not None:
                    yield tag.start(), Point(x=numbers[0], y=numbers[1], label=label)


@dataclass(slots=True)
class _Open:
    """An element whose end tag has not come yet; without a box it only keeps the nesting."""

    name: str
    start: int
    box: Box | None
    pieces: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Html:
    text: str
    report: Report
    stack: list[_Open] = field(default_factory=list)
    located: list[_Open] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)
    found: list[tuple[int, Element]] = field(default_factory=list)

    def read(self) -> list[tuple[int, Element]]:
        at = 0
        while tag := _TAG.search(self.text, at):
            self._say(self.text[at : tag.start()])
            at = tag.end()
            if tag["comment"]:
                end = self.text.find("-->", at)
                at = len(self.text) if end < 0 else end + 3
                self.report.truncated |= end < 0
                continue
            name = tag["name"].lower()
            if name not in INLINE_TAGS:
                self._say(" ")
            if tag["close"]:
                self._close(name, tag)
            else:
                self._open(name, tag)
        cut = self.text.find("<", at)
        inside_tag = cut >= 0 and re.match(r"[A-Za-z/!]|\Z", self.text[cut + 1 : cut + 2])
        inside = self.located or self.names["html"] or self.names["body"]
        self.report.truncated |= bool(inside or inside_tag)
        return self.found

    def _say(self, piece: str) -> None:
        if self.located and piece:
            self.located[-1].pieces.append(piece)

    def _open(self, name: str, tag: re.Match[str]) -> None:
        attributes = _attributes(tag["attributes"])
        box = None
        if "data-bbox" in attributes:
            numbers = self.report.numbers("data-bbox", _values(attributes["data-bbox"]), 4)
            if numbers is not None:
                box = self.report.box(numbers, attributes.get("class") or name)
        element = _Open(name, tag.start(), box)
        if name in VOID_TAGS or tag["attributes"].endswith("/"):
            element.pieces.append(attributes.get("alt", ""))
            self._finish(element, tag.end())
            return
        self.stack.append(element)
        self.names[name] += 1
        if box is not None:
            self.located.append(element)

    def _close(self, name: str, tag: re.Match[str]) -> None:
        """Close up to the element that the tag belongs to; a tag that belongs to none is passed over."""
        if not self.names[name]:
            if name not in VOID_TAGS:
                self.report.repairs.add("stray end tag")
            return
        while True:
            element = self.stack.pop()
            self.names[element.name] -= 1
            if element.box is not None:
                self.located.pop()
            if element.name == name:
                self._finish(element, tag.end())
                return
            if element.box is not None:
                self.report.repairs.add("missing end tag")
            self._finish(element, tag.start())

    def _finish(self, element: _Open, end: int) -> None:
        if element.box is not None:
            text = " ".join(_plain("".join(element.pieces)).split())
            one = Element(tag=element.name, box=element.box, text=text, start=element.start, end=end)
            self.found.append((element.start, one))


def html_elements(text: str, report: Report) -> list[tuple[int, Element]]:
    """Every element with `data-bbox`; see `parse.parse_html`."""
    return _Html(text, report).read()


def markdown_elements(text: str, report: Report) -> list[tuple[int, Element]]:
    """Every comment with a place, and the block behind it; see `parse.parse_markdown`."""
    found = []
    marks = list(_PLACED.finditer(text))
    for index, mark in enumerate(marks):
        limit = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        numbers = report.numbers("comment", _values(mark[2]), 4)
        if numbers is None:
            continue
        tag = mark[1].strip().lower()
        end = _block_end(text, mark.end(), limit, tag)
        if end is None:
            report.truncated |= limit == len(text)
            report.drop("markdown", text[mark.start() : mark.end()], "stands before LaTeX without an end")
            continue
        block = text[mark.end() : end].strip()
        element = Element(
            tag=tag, box=report.box(numbers, tag), text=block, start=mark.start(), end=max(end, mark.end())
        )
        found.append((mark.start(), element))
    last = text.rfind("<!--")
    report.truncated |= last >= 0 and text.find("-->", last) < 0
    return found


def _block_end(text: str, start: int, limit: int, tag: str) -> int | None:
    """Where the block behind a comment ends, at most at `limit`; None for LaTeX without an end."""
    while start < limit and text[start].isspace():
        start += 1
    environment = _ENVIRONMENT.match(text, start, limit)
    if environment:
        closing = f"\\end{{{environment[1]}}}"
        end = text.find(closing, environment.end(), limit)
        return None if end < 0 else end + len(closing)
    if tag in ("image", "figure") and not text.startswith("![", start):
        return start
    blank = _BLANK_LINE.search(text, start, limit)
    return blank.start() if blank else limit
