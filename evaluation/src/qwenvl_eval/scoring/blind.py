"""What can be had without looking at the picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable


class BlindAnswers:
    """Answers a question with the most frequent training answer to the same question text.

    A question never seen in training gets the most frequent answer of all. Of several equally frequent ones
    the first in alphabetical order is taken.
    """

    def __init__(self, training: Iterable[tuple[str, str]]) -> None:
        """``training``: pairs of question and answer. Raises ValueError when there are none."""
        by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in training:
            by_question[question][answer] += 1
            overall[answer] += 1
        if not overall:
            raise ValueError("no training answers: without them nothing can be answered without looking")
        self._known = {question: _most_frequent(counts) for question, counts in by_question.items()}
        self._otherwise = _most_frequent(overall)

    def answer(self, question: str) -> str:
        return self._known.get(question, self._otherwise)


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
