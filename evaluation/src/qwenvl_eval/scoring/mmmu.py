"""MMMU as its own script scores it (``parse_and_eval`` of the benchmark's ``eval_utils``), quirks included.

The one thing not taken over is the random choice where nothing is found: that answer is UNPARSED, and its
``chance`` is what guessing would have given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_eval.scoring.verdict import Outcome, Verdict

_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
# The published patterns, made linear: no match begins or ends within a run of digits.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])"),
)


def official(answer: str, target: Mapping[str, Any]) -> Verdict:
    """The benchmark's own verdict.

    ``target``: ``type`` "multiple-choice" or "open", ``answer`` (a letter; for open questions a text or a
    list of texts, each of which is right), ``options`` (letter -> text).
    """
    golds = target["answer"]
    golds = [golds] if isinstance(golds, str) else golds
    if target["type"] == "open":
        parsed = parse_open(answer)
        if parsed == [""]:
            return Verdict(Outcome.UNPARSED)
        right = match_open(golds, parsed)
        extracted = " | ".join(map(str, parsed))
    else:
        letter = parse_choice(answer, target["options"])
        if letter is None:
            return Verdict(Outcome.UNPARSED, chance=1 / len(target["options"]))
        right = letter in golds
        extracted = letter
    return Verdict(Outcome.RIGHT if right else Outcome.WRONG, extracted)


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that the official parser reads; None where it would draw one.

    Official name: ``parse_multi_choice_response``. "(B)" goes before " B ", and that before an option's text,
    which counts in answers of more than five words. Of several the one that occurs last is taken.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    lowered = answer.lower()
    ways = [(answer, {letter: f"({letter})" for letter in options})]
    ways.append((answer, {letter: f" {letter} " for letter in options}))
    if len(answer.split()) > 5:
        ways.append((lowered, {letter: text.lower() for letter, text in options.items()}))
    for text, names in ways:
        places = {letter: text.rfind(name) for letter, name in names.items()}
        if found := [letter for letter in places if places[letter] >= 0]:
            return max(found, key=places.__getitem__)
    return None


def parse_open(answer: str) -> list[str | float]:
    """Texts and numbers that the official parser reads in an answer to an open question, in no set order.

    Official name: ``parse_open_response``. The answer is in lower case when it is split at full stops before
    capitals, so that only line ends split it.
    """
    tails = _key_tails(answer)
    parts = tails + [number for tail in tails for pattern in _NUMBERS for number in pattern.findall(tail)]
    return list(dict.fromkeys(form for part in parts for form in _normalised(part)))


def match_open(golds: Sequence[str], parsed: Sequence[str | float]) -> bool:
    """Whether a gold text stands in a parsed text, or a gold number equals a parsed one.

    Official name: ``eval_open``.
    """
    forms = [form for gold in golds for form in _normalised(gold)]
    texts = [form for form in forms if isinstance(form, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in forms for value in parsed
    )


def _key_tails(answer: str) -> list[str]:
    """Of each line the shortest tail behind a cue; the whole answer where no line has one."""
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    tails = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for cue in (*_CUES, "=") if number == len(lines) else _CUES:
            if cue in line:
                tail = line.rpartition(cue)[2].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    return tails or [answer]


def _normalised(text: str) -> list[str | float]:
    """A number rounded to two places, or a text in lower case; one character gets a space at either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
