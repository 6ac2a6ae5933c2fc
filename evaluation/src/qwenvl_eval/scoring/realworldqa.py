"""RealWorldQA, which has no script of its own: the two protocols in use.

``letter`` compares what the model wrote; ``rule`` is the multiple-choice rule of the judge protocol.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenvl_eval.scoring.choice import by_rule as rule
from qwenvl_eval.scoring.verdict import Outcome, Verdict

__all__ = ["letter", "rule"]

_LETTER = re.compile(r"\s*(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])(?:\s*[.:,)]|\s*$))")


def letter(answer: str, target: Mapping[str, Any]) -> Verdict:
    """Right where the letter that opens the answer is the gold one, else where both texts are equal.

    "B", "b.", "(B) red" and "B) red" open with a letter, "A red car" does not. Texts are compared in lower
    case, without white space and full stops at the end; an option's text stands for its letter.
    ``target``: ``type`` "multiple-choice" or "open", ``answer`` (a letter or a text), ``options`` (letter ->
    text).
    """
    text = _plain(answer)
    if not text:
        return Verdict(Outcome.UNPARSED)
    if target["type"] == "open":
        return Verdict(Outcome.RIGHT if text == _plain(target["answer"]) else Outcome.WRONG, text)
    options = target["options"]
    opening = _LETTER.match(answer)
    read = (opening[1] or opening[2]).upper() if opening else ""
    if read not in options:
        named = [name for name, option in options.items() if _plain(option) == text]
        if len(named) != 1:
            return Verdict(Outcome.UNPARSED)
        read = named[0]
    return Verdict(Outcome.RIGHT if read == target["answer"] else Outcome.WRONG, read)


def _plain(text: str) -> str:
    return text.lower().strip().rstrip(".").rstrip()
