"""What becomes of a sample that is longer than --model_max_length, by --too_long.

    fail        it stops the run (with --bad_samples skip it is left out and counted)
    skip        it is left out and counted
    drop_turns  its last questions and answers go, until it fits
    drop_media  its last pictures and videos go, each whole, until it fits
      -> fit -> Fitted(sample, size, turns and media that went)

The last turns go, not the first: what is said later leans on what was said before, and pictures mostly stand
at the beginning. Nothing is cut inside a turn or a medium, and no question is left without a word. Sizes come
from headers; finding what fits takes a few measurements, not one for each turn.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qwen_vl_utils import PromptSize
from qwenvl.data.messages import Sample, says_something

DROPPING = ("drop_turns", "drop_media")
POLICIES = ("fail", "skip", *DROPPING)


class TooLong(ValueError):
    """A sample exceeds the longest length and is not to be, or cannot be, shortened to it."""


@dataclass(frozen=True)
class Fitted:
    """A sample within the longest length; what went: turns and media."""

    sample: Sample
    size: PromptSize
    turns: int = 0
    media: int = 0


def fit(sample: Sample, limit: int, policy: str, measure: Callable[[Sample], PromptSize]) -> Fitted:
    """The sample, shortened by the policy where it has more than `limit` tokens.

    measure: the size of a sample, from headers. Raises TooLong, which says how long it is and of what parts,
    where the policy does not shorten or nothing that it may take away makes the sample fit.
    """
    size = measure(sample)
    if size.tokens <= limit:
        return Fitted(sample, size)
    # What is left when 1, 2, ... parts have gone: ever shorter.
    shorter: list[Callable[[], Sample]] = []
    media = sum(1 for _ in sample.media())
    if policy == "drop_turns":
        shorter = [partial(_prefix, sample, end) for end in reversed(_ends(sample))]
    elif policy == "drop_media":
        shorter = [partial(_with_media, sample, stay) for stay in reversed(range(media))]
    measured: dict[int, Fitted] = {}

    def fits(place: int) -> bool:
        left = shorter[place]()
        turns = len(sample.messages) - len(left.messages)
        gone = media - sum(1 for _ in left.media())
        measured[place] = Fitted(left, measure(left), turns, gone)
        return measured[place].size.tokens <= limit

    place = bisect_left(range(len(shorter)), True, key=fits)
    if place == len(shorter) or _has_wordless_turn(measured[place].sample):
        raise refusal(sample, size.tokens, limit, policy)
    return measured[place]


def refusal(sample: Sample, tokens: int, limit: int, policy: str) -> TooLong:
    """What is said of a sample that stays too long."""
    tried = f"; --too_long {policy} finds nothing that makes it fit" if policy in DROPPING else ""
    return TooLong(
        f"{tokens} tokens ({_parts(sample)}) exceed --model_max_length {limit}{tried}; raise it, lower "
        "--max_pixels or --video_max_pixels, or shorten the row"
    )


def _has_wordless_turn(sample: Sample) -> bool:
    contents = [message["content"] for message in sample.messages]
    return not all(says_something(content) for content in contents if isinstance(content, list))


def _ends(sample: Sample) -> list[int]:
    """How many messages may stay, ascending: up to an answer, one before it or itself carrying loss."""
    ends, weights, carries = [], iter(sample.weights), False
    for number, message in enumerate(sample.messages[:-1], 1):
        if message["role"] == "assistant":
            carries = carries or next(weights) > 0
            if carries:
                ends.append(number)
    return ends


def _prefix(sample: Sample, end: int) -> Sample:
    """The first messages of a sample."""
    messages = sample.messages[:end]
    answers = sum(message["role"] == "assistant" for message in messages)
    return replace(sample, messages=messages, weights=sample.weights[:answers])


def _with_media(sample: Sample, stay: int) -> Sample:
    """A sample with its first `stay` pictures and videos; the text around the others stays."""
    seen = itertools.count()
    messages: list[dict[str, Any]] = []
    for message in sample.messages:
        content = message["content"]
        if isinstance(content, list):
            content = [item for item in content if item["type"] == "text" or next(seen) < stay]
        messages.append({**message, "content": content})
    return replace(sample, messages=messages)


def _parts(sample: Sample) -> str:
    kinds = [item["type"] for item in sample.media()]
    return f"{kinds.count('image')} pictures, {kinds.count('video')} videos, {len(sample.messages)} turns"
