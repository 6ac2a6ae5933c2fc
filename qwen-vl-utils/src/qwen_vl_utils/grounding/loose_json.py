"""JSON as models write it, read in one pass that never goes back.

text --next [ or {--> tokens --stack of open containers--> every dict that was closed, with its position

Each character is looked at a bounded number of times and nothing recurses, so a hostile text costs what a
long one costs. A dict counts once its closing brace is read: of a text that was cut off, exactly the whole
ones remain. Prose between values is skipped; a bracket in prose is given up at the first word behind it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 64
"""Containers within containers; what is nested deeper is given up. Answers need four or five."""

_OPENING = re.compile(r"[\[{]")
_TOKEN = re.compile(
    r"\s*+(?:(?P<fence>```)|(?P<comment>//[^\n]*+|\#[^\n]*+|/\*)|(?P<punct>[{}\[\](),:，：])"
    r"|(?P<quote>[\"'])|(?P<atom>(?:(?!/[/*])[^\s{}\[\](),:，：\"'\#])++))"
)
_WORDS = re.compile(r"(?:(?!/[/*])[^{}\[\],，\"\n])*+")
_STEP = {quote: re.compile(rf"\\[\s\S]?|{quote}") for quote in "\"'"}
# A quote ends its string only where JSON could go on behind it; any other one is part of the text. For valid
# JSON that is always the case, for `"the "big" dog"` it finds the end that was meant.
_CLOSES = re.compile(
    r"[ \t\r]*+(?:\Z|[\n:：\]})]|//|\#|/\*|```|[,，]\s*+(?:\Z|[\"'\[{\]}()\d\-/#]|"
    r"(?:true|false|null|None|True|False|NaN|Infinity)\b|[A-Za-z_]\w*+\s*+(?::|\Z)))"
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}|[\s\S]|\Z)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z")
_ESCAPED = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_JSON_WORDS = {"true": True, "false": False, "null": None}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_NOT_FINITE = {
    name: float(name.lower())
    for name in ("NaN", "nan", "Infinity", "-Infinity", "inf", "-inf", "+inf", "Inf")
}
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A dict, or a list of nothing but numbers that no key holds, at text[start:end].

    depth: how many containers it stands in.
    """

    value: Mapping[str, Any] | Sequence[Any]
    start: int
    end: int
    depth: int


@dataclass(frozen=True, kw_only=True)
class Loose:
    """Everything found, in the order in which it begins; the rest as in `Parsed`."""

    found: tuple[Found, ...]
    truncated: bool
    repairs: frozenset[str]


def read(text: str) -> Loose:
    """Every whole dict in `text`, however deep it stands, and every bare list of numbers."""
    reader = _Reader(text)
    while reader.advance():
        pass
    found = sorted(reader.found, key=lambda one: one.start)
    return Loose(found=tuple(found), truncated=reader.truncated, repairs=frozenset(reader.repairs))


def number(text: str) -> int | float | None:
    """The number that `text` is, or None; may be infinite."""
    if not _NUMBER.match(text):
        return None
    digits = text.lstrip("+-")
    return int(text) if digits.isdigit() and len(digits) <= 18 else float(text)


@dataclass(slots=True)
class _Frame:
    """An open container. A dict goes through: no key, key, key with colon, value (no key again)."""

    opener: str
    start: int
    value: Any
    key: str | None = None
    quoted: bool = False
    colon: bool = False
    comma: bool = True  # nothing stands between the last comma (or the opening) and here
    evidence: bool = False  # a colon was read: this is data, no bracket in prose


@dataclass(slots=True)
class _Reader:
    text: str
    position: int = 0
    stack: list[_Frame] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    repairs: set[str] = field(default_factory=set)
    mended: set[str] = field(default_factory=set)  # in the value at hand; counts once that gave something
    gave: bool = False  # the value at hand held something
    truncated: bool = False
    braces: int = 0
    evidence: int = 0

    def advance(self) -> bool:
        """Read one token; False at the end of the text."""
        if not self.stack:
            opening = _OPENING.search(self.text, self.position)
            if opening is None:
                return False
            self.position = opening.end()
            self._open(opening[0], opening.start())
            return True
        token = _TOKEN.match(self.text, self.position)
        if token is None:
            return self._end()
        self.position = token.end()
        kind, start = token.lastgroup, token.start(token.lastgroup or 0)
        if kind == "punct":
            self._punctuation(self.text[start], start)
        elif kind == "quote":
            return self._string(start)
        elif kind == "atom":
            return self._atom(start)
        elif kind == "fence":
            self.truncated = True
            self._give_up()
        else:
            return self._comment(token["comment"])
        return True

    def _end(self) -> bool:
        self.truncated = True
        self.position = len(self.text)
        self._give_up()
        return False

    def _give_up(self) -> None:
        """Leave all open containers; the whole dicts in them are kept."""
        self.stack.clear()
        self.braces = self.evidence = 0
        self._settle()

    def _settle(self) -> None:
        if self.gave:
            self.repairs |= self.mended
        self.mended.clear()
        self.gave = False

    def _comment(self, opening: str) -> bool:
        self.mended.add("comment")
        if opening != "/*":
            return True
        end = self.text.find("*/", self.position)
        if end < 0:
            return self._end()
        self.position = end + 2
        return True

    def _punctuation(self, sign: str, at: int) -> None:
        frame = self.stack[-1]
        if sign in "，：":
            self.mended.add("full-width punctuation")
        if sign in "{[(":
            self._open(sign, at)
        elif sign in "}])":
            self._close(sign)
        elif sign in ",，":
            if frame.comma:
                self.mended.add("stray comma")
            self._forget_key(frame)
            frame.comma = True
        elif frame.key is not None and not frame.colon:
            frame.colon = True
            if not frame.evidence:
                frame.evidence = True
                self.evidence += 1
        else:
            self._stray()

    def _open(self, opener: str, at: int) -> None:
        if self.stack:
            frame = self.stack[-1]
            if opener == "{" and frame.opener == "{" and frame.key is None and frame.value:
                self.mended.add("missing bracket")  # {"a": 1, {"a": 2}: the first brace was never closed
                self._pop()
        if len(self.stack) >= MAX_DEPTH:
            self.repairs.add("nested too deep")
            self._give_up()
            return
        self.stack.append(_Frame(opener, at, {} if opener == "{" else []))
        self.braces += opener == "{"

    def _close(self, closer: str) -> None:
        """Close up to the container that `closer` belongs to; one that belongs to none is passed over."""
        brace = closer == "}"
        if not (self.braces if brace else len(self.stack) - self.braces):
            self._stray()
            return
        while (self.stack[-1].opener == "{") != brace:
            self.mended.add("missing bracket")
            self._pop()
        if self.stack[-1].opener == "(":
            self.mended.add("tuple")
        self._pop()

    def _pop(self) -> None:
        frame = self.stack.pop()
        self._forget_key(frame)
        if frame.comma and frame.value:
            self.mended.add("trailing comma")
        value, is_dict = frame.value, frame.opener == "{"
        self.braces -= is_dict
        self.evidence -= frame.evidence
        held = bool(self.stack) and self.stack[-1].opener == "{"
        if is_dict or (not held and value and all(_is_number(one) for one in value)):
            self.found.append(Found(value=value, start=frame.start, end=self.position, depth=len(self.stack)))
            self.gave |= bool(value)
        if self.stack:
            self._add(value)
        else:
            self._settle()

    def _forget_key(self, frame: _Frame) -> None:
        if frame.key is not None:
            self.mended.add("key without value")
            frame.key, frame.colon = None, False

    def _stray(self) -> None:
        """Something that has no place here: mended by leaving it out, or a sign that this is prose."""
        if self.evidence:
            self.mended.add("stray text")
        else:
            self._give_up()

    def _add(self, value: Any) -> None:
        """A whole value that is not a key, into the innermost open container."""
        frame = self.stack[-1]
        if frame.opener != "{":
            if not frame.comma:
                self.mended.add("missing comma")
            frame.value.append(value)
        elif frame.key is None:
            self.mended.add("stray text")
        else:
            if not frame.colon:
                self.mended.add("missing colon")
            if frame.key in frame.value:
                self.mended.add("repeated key")
            frame.value[frame.key] = value
            frame.key, frame.colon = None, False
        frame.comma = False

    def _key(self, name: str, *, quoted: bool) -> None:
        frame = self.stack[-1]
        if not frame.comma:
            self.mended.add("missing comma")
        if not quoted:
            self.mended.add("unquoted key")
        frame.key, frame.quoted, frame.comma = name, quoted, False

    def _string(self, start: int) -> bool:
        quote = self.text[start]
        step, at = _STEP[quote], start + 1
        while True:
            sign = step.search(self.text, at)
            if sign is None:
                return self._end()
            at = sign.end()
            if sign[0] == quote:
                if _CLOSES.match(self.text, at):
                    break
                self.mended.add("unescaped quote")
        self.position = at
        if quote == "'":
            self.mended.add("single quotes")
        content = self._unescaped(self.text[start + 1 : at - 1])
        frame = self.stack[-1]
        if frame.opener == "{" and frame.key is None:
            self._key(content, quoted=True)
        else:
            self._add(content)
        return True

    def _unescaped(self, content: str) -> str:
        if "\\" not in content:
            return content

        def plain(escape: re.Match[str]) -> str:
            name = escape[1]
            if len(name) > 1:
                return chr(int(name[1:], 16))
            if name not in _ESCAPED:
                self.mended.add("unknown escape")
            return _ESCAPED.get(name, escape[0])

        content = _ESCAPE.sub(plain, content)
        if _SURROGATE.search(content):  # pairs become one character, halves the replacement character
            content = content.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return content

    def _atom(self, start: int) -> bool:
        """A number, a word that JSON or Python knows, an unquoted key or text, or prose."""
        word, frame = self.text[start : self.position], self.stack[-1]
        if frame.opener == "{" and frame.key is None:
            self._key(word, quoted=False)
            return True
        if frame.opener == "{" and not frame.colon and not frame.quoted and not self.evidence:
            self._give_up()  # {two words
            return True
        value = self._known(word)
        clock = value is not _MISSING and self.text.startswith((":", "："), self.position)
        if value is not _MISSING and not clock:
            self._add(value)
            return True
        if not self.evidence:
            self._give_up()
            return True
        words = _WORDS.match(self.text, start)
        end = words.end() if words else self.position
        if end == len(self.text):
            return self._end()
        self.position = end
        self.mended.add("unquoted text")
        self._add(self.text[start:end].strip())
        return True

    def _known(self, word: str) -> Any:
        if word in _JSON_WORDS:
            return _JSON_WORDS[word]
        if word in _PYTHON_WORDS:
            self.mended.add("python literal")
            return _PYTHON_WORDS[word]
        if word in _NOT_FINITE:
            return _NOT_FINITE[word]
        value = number(word)
        return _MISSING if value is None else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
