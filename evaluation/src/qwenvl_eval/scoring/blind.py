"""What can be had without looking at the picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

CANDIDATES = 40


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


def best_constant(
    targets: Sequence[Mapping[str, Any]], metric: Callable[[str, Mapping[str, Any]], float]
) -> str:
    """The one of the targets' own answers that scores best when it is given to all of them.

    For exact match that is the most frequent answer; for boxes and the like, where hardly two are the same,
    it is the one in the middle. Only the ``CANDIDATES`` most frequent are tried; of equally good ones the
    first in that order is taken, for equal counts the alphabetical one. Raises ValueError for no targets.
    """
    if not targets:
        raise ValueError("no training targets: there is no constant answer to choose")
    counts = Counter(target["answer"] for target in targets)
    candidates = sorted(counts, key=lambda answer: (-counts[answer], answer))[:CANDIDATES]
    return max(candidates, key=lambda answer: sum(metric(answer, target) for target in targets))
