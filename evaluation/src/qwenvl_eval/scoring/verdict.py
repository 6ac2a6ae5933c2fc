"""What a protocol says of one answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """What became of a question. Only RIGHT counts for a model; the others say why it did not.

    UNPARSED: the protocol found no answer in the text. TRUNCATED: cut at the token limit before a right
    answer stood there. REFUSED: the server or the model would not answer this question. FAILED: no answer
    came.
    """

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TRUNCATED = "truncated"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """``extracted`` is what the protocol read in the answer, as text; "" for UNPARSED.

    ``chance`` is for protocols whose published code guesses where it finds nothing: the share of right
    answers that guessing would have given here, one over what is guessed among. It makes the bracket and
    never the headline. ``score`` is from 0 to 1 where a protocol grades, None where it does not.
    """

    outcome: Outcome
    extracted: str = ""
    chance: float = 0.0
    score: float | None = None

    @property
    def right(self) -> bool:
        return self.outcome is Outcome.RIGHT


Scorer = Callable[[str, Mapping[str, Any]], Verdict]
"""``(answer, target) -> Verdict``; the target is the sample's JSON object, which each protocol documents."""
