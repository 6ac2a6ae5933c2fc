"""Video-MME as its own script scores it (``extract_characters_regex`` of ``eval_your_results.py``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenvl_eval.scoring.verdict import Outcome, Verdict

_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",  # two commas are missing in the published list
    "Best answer:Best option:",
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)


def official(answer: str, target: Mapping[str, Any]) -> Verdict:
    """The benchmark's own verdict; where its script finds no letter it leaves the question out: UNPARSED.

    ``target``: ``answer``, one of A to D.
    """
    letter = parse(answer)
    if not letter:
        return Verdict(Outcome.UNPARSED)
    return Verdict(Outcome.RIGHT if letter == target["answer"] else Outcome.WRONG, letter)


def parse(answer: str) -> str:
    """The first capital A to D once the prefixes are gone, wherever it stands; "" where there is none.

    "Based on the video, C" is B, and so is "Best answer: C". The script's other rule, nothing for more than
    ten words without such a letter, never changes that.
    """
    answer = answer.strip()
    for prefix in _PREFIXES:
        answer = answer.replace(prefix, "")
    found = re.search("[A-D]", answer)
    return found[0] if found else ""
