"""Whether two mathematical answers are the same, without evaluating a word of them as Python.

Texts, numbers and fractions are compared here. Everything else goes to :mod:`.algebra`, in a process that is
ended where it takes too long. What is longer or deeper than an answer ever is goes nowhere: it is no value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from qwenvl_eval.scoring.sandbox import Ended, Sandbox

TOLERANCE = 1e-6
_LONGEST = 200  # characters
_DEEPEST = 3  # brackets in one another; the parser takes twice as long for each
_HIGHEST = 2  # exponents in one another
_DEEPEST_ARGUMENT = 12  # \frac{\sqrt{...}}{...}
_HOPELESS = re.compile(r"\d{60}|\\(?:[io]*int|sum|prod|lim)(?![a-z])")  # nothing that is worked out
_MOST = {"|": 6, "!": 6, "^": 12, ",": 24, "/": 12}

_SANDBOX = Sandbox(Path(__file__).with_name("algebra.py"))

_SKIPPED = re.compile(r"\$|~|\\displaystyle|\\quad")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_UNOFFICIAL = re.compile(r"\\(?:circ|boxed)|(?<!\d\\)%|[^\x20-\x7e]")

_MARKS = re.compile(
    r"\$|\\[()\[\],;:!]|\\(?:left|right|displaystyle|quad|qquad)(?![a-z])"
    r"|\^?\{?\\(?:circ|degree)(?![a-z])\}?|°|\\?%"
)
_UNIT = re.compile(
    r"(?<=[\d})\]])\s*(?:"
    r"(?:\\(?:text|mathrm|mbox|textrm)\s*)?\{[~\s]*[A-Za-z./\s]{1,24}\}"
    r"|(?:square |cubic )?(?:[cdkm]m|kg|ml|degrees?|units?|inch(?:es)?|feet|hours?|minutes?|seconds?"
    r"|metres?|meters?)"
    r")(?:\s*\^?\{?[23²³]\}?)?\s*$"
)
_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt "}
)
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?){_NUMBER}")
_FRACTION = re.compile(r"([+-]?)(?:(\d+)\s*(?= |\\))?\s*(?:\\frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)\s*/\s*(\d+))")


@dataclass(frozen=True)
class Comparison:
    """Which of the texts that an answer was compared with are the same.

    ``note`` says why some could not be compared; they count as different then.
    """

    equal: tuple[bool, ...]
    note: str = ""


def compare(one: str, others: Sequence[str], tolerance: float = TOLERANCE) -> Comparison:
    """Which of ``others`` mean the same, in LaTeX or plain text; numbers within the relative ``tolerance``.

    Units at the end, degrees and percent signs are left out, on both sides. Words are compared as words, in
    any case, and a ratio, "1:2", is no number. One limit of time holds for all others together.
    """
    one, others = plain(one), [plain(other) for other in others]
    known = [_known(one, other, tolerance) for other in others]
    open_ones = [other for other, equal in zip(others, known, strict=True) if equal is None]
    if not open_ones:
        return Comparison(tuple(map(bool, known)))
    fitting = tuple(other for other in open_ones if _fits(one) and _fits(other))
    note = "" if len(fitting) == len(open_ones) else "no formula, or too long a one"
    same: Sequence[bool] = ()
    if fitting:
        try:
            same = _compared(one, fitting, tolerance)
        except Ended:
            note = "took too long to be compared"
    right = {other for other, equal in zip(fitting, same, strict=False) if equal}
    return Comparison(
        tuple(other in right if equal is None else equal for other, equal in zip(others, known, strict=True)),
        note,
    )


def value(text: str) -> int | float | None:
    """The number that the MathVision script's parser and Python's ``math`` make of LaTeX; None for no number.

    Symbols have no value there. Degrees, boxes and a percent sign without a backslash are no LaTeX to it.
    """
    text = _SKIPPED.sub(" ", text).strip()
    if not _fits(text):
        return None
    if found := _PLAIN.fullmatch(text):
        return float(found[0]) if "." in found[0] else int(found[0])
    if _UNOFFICIAL.search(text) or re.search("[A-Za-z]", _COMMAND.sub("", text)):
        return None
    return _evaluated(text)


def number(text: str) -> Fraction | None:
    """The exact value of "-1.50", "1,234", "3/4", "2 1/2" or "2\\frac{1}{2}"; None for everything else."""
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    if re.fullmatch(r"[+-]?\d{1,3}(?:\{?,\}?\d{3})+(?:\.\d+)?", text):
        text = re.sub("[{},]", "", text)
    if found := _PLAIN.fullmatch(text):
        return _signed(found[1], Fraction(found[2]))
    if found := _FRACTION.fullmatch(text):
        whole, above, below = found[2] or 0, found[3] or found[5], found[4] or found[6]
        return _signed(found[1], int(whole) + Fraction(int(above), int(below))) if int(below) else None
    return None


def plain(text: str) -> str:
    """Without delimiters, spacing, degrees, percent signs, a unit and the full stop at the end.

    "\\dfrac12" becomes "\\frac{1}{2}", "\\sqrt3" becomes "\\sqrt{3}", and × ÷ · − π √ become LaTeX.
    """
    text = text.strip()[: 4 * _LONGEST].translate(_SYMBOLS)
    text = _MARKS.sub("", text).replace("~", " ").strip().rstrip(".").strip()
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d+)", r"\\sqrt{\1}", text)
    return _UNIT.sub("", text).strip()


def ended() -> int:
    """How many comparisons were given up in this process because they took too long."""
    return _SANDBOX.ended


@lru_cache(4096)
def _evaluated(text: str) -> int | float | None:
    try:
        return _SANDBOX.ask("value", text)
    except Ended:
        return None


@lru_cache(4096)
def _compared(one: str, others: tuple[str, ...], tolerance: float) -> Sequence[bool]:
    return _SANDBOX.ask("equal", one, others, tolerance)


def _known(one: str, other: str, tolerance: float) -> bool | None:
    """Whether two plain texts mean the same, where that can be told without a parser."""
    if _squeezed(one) == _squeezed(other):
        return bool(one)
    first, second = number(one), number(other)
    if first is not None and second is not None:
        return abs(first - second) <= tolerance * max(abs(first), abs(second))
    if _is_words(one) or _is_words(other) or (":" in one) != (":" in other):
        return False
    return None


def _fits(text: str) -> bool:
    """Whether the text is short and flat enough for the parser, and not plainly something else than LaTeX."""
    if len(text) > _LONGEST or any(text.count(mark) > most for mark, most in _MOST.items()):
        return False
    if not (text.isascii() and text.isprintable()) or _HOPELESS.search(text):
        return False
    groups: list[str] = []
    before = ""
    for character in text:
        if character in "([{":
            argument = character == "{" and (before.isalpha() or before in ("^", "_", "}", "]"))
            groups.append(before if argument else "")
            if len(groups) > _DEEPEST_ARGUMENT or groups.count("") > _DEEPEST or groups.count("^") > _HIGHEST:
                return False
        elif character in ")]}":
            if not groups:
                return False
            groups.pop()
        before = character
    return not groups


def _is_words(text: str) -> bool:
    return (
        re.fullmatch(r"[^\W\d_]++(?:[\s,;.'’]++[^\W\d_]++)*+[\s,;.'’]*", text) is not None
        and "\\" not in text
    )


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def _signed(sign: str, magnitude: Fraction) -> Fraction:
    return -magnitude if sign == "-" else magnitude
