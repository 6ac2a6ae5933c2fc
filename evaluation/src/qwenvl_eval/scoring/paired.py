"""Two runs on the same questions: whether they differ, by how much, and how many questions show it.

Questions that both runs get right, or both wrong, say nothing about which is better; the others decide.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from qwenvl_eval.scoring.intervals import Z95


@dataclass(frozen=True)
class Comparison:
    """The second run against the first.

    ``both``, ``only_first``, ``only_second`` and ``neither`` count questions by who was right.
    ``difference`` is the second's accuracy minus the first's, -1 to 1, between ``low`` and ``high`` (95 %).
    ``mcnemar`` is the p value were all questions independent. ``sign_flip``, the one to go by, takes only
    the ``clusters`` to be, the pictures. ``design_effect``: by how much the clusters raise the variance of
    the difference, at least 1.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    clusters: int
    difference: float
    low: float
    high: float
    mcnemar: float
    sign_flip: float
    design_effect: float

    @property
    def total(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    def questions_for(self, difference: float, power: float = 0.8) -> int:
        """How many such questions show a true difference of that size; see :func:`questions_needed`.

        Runs disagree on as many questions as these do, or on as few as make that difference.
        """
        discordant = max((self.only_first + self.only_second) / self.total, abs(difference))
        return questions_needed(difference, discordant, power=power, design_effect=self.design_effect)

    def __str__(self) -> str:
        points = f"{100 * self.difference:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{points}, p = {self.sign_flip:.3g}"


def compare(first: Sequence[bool], second: Sequence[bool], clusters: Sequence[Hashable]) -> Comparison:
    """What two runs' verdicts on the same questions say; ``clusters[i]`` is the picture question i is about.

    The interval is Tango's score interval (1998) for paired shares, at the effective sample size n / d. d is
    the cluster-robust variance of the mean difference over that of independent questions, and never below 1.
    Where every question says the same the data says nothing about d, and the number of clusters stands for
    the effective size.
    Raises ValueError for no questions and for lengths that differ.
    """
    total = len(first)
    if not total:
        raise ValueError("comparison of no verdicts: there is nothing to compare")
    if len(second) != total or len(clusters) != total:
        raise ValueError(
            f"{total} verdicts of the first run, {len(second)} of the second and {len(clusters)} clusters; "
            "give both runs' verdicts on the same questions, and one cluster per question"
        )
    cells = Counter((bool(one), bool(other)) for one, other in zip(first, second, strict=True))
    gained, lost = cells[False, True], cells[True, False]
    differences = [bool(other) - bool(one) for one, other in zip(first, second, strict=True)]
    effect, count = _design_effect(differences, clusters)
    low, high = tango(gained / effect, lost / effect, total / effect)
    return Comparison(
        both=cells[True, True],
        only_first=lost,
        only_second=gained,
        neither=cells[False, False],
        clusters=count,
        difference=(gained - lost) / total,
        low=low,
        high=high,
        mcnemar=mcnemar(lost, gained),
        sign_flip=sign_flip(differences, clusters),
        design_effect=effect,
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p value: of that many questions that differ, each favours either run by a coin."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total)


def sign_flip(differences: Sequence[int], clusters: Sequence[Hashable]) -> float:
    """The two-sided p value of a permutation test that swaps the two runs picture by picture.

    ``differences``: second verdict minus first, -1, 0 or 1. All swaps are counted and none is drawn, so there
    is no seed. With one question per picture it is McNemar's exact test.
    """
    sums = _sums(differences, clusters)
    observed = abs(sum(sums.values()))
    reach = 0
    probability = [1.0]  # of each total from -reach to reach
    for size, count in sorted(Counter(abs(value) for value in sums.values() if value).items()):
        steps = [math.comb(count, k) / 2**count for k in range(count + 1)]
        wider = [0.0] * (len(probability) + 2 * size * count)
        for place, known in enumerate(probability):
            for k, step in enumerate(steps):
                wider[place + 2 * size * k] += known * step
        probability, reach = wider, reach + size * count
    return min(1.0, math.fsum(p for place, p in enumerate(probability) if abs(place - reach) >= observed))


def questions_needed(
    difference: float, discordant: float, *, power: float = 0.8, design_effect: float = 1.0
) -> int:
    """Questions that show a true ``difference`` in accuracy at p < .05, two-sided, with that ``power``.

    ``discordant``: the share of questions that only one run gets right, at least the difference.
    Connor's formula (1987) for McNemar's test, times the design effect.
    Raises ValueError for shares that cannot be.
    """
    size = abs(difference)
    if not 0 < size <= discordant <= 1:
        raise ValueError(
            f"difference={difference} and discordant={discordant}: give a difference other than 0, no larger "
            "than the share of questions that the runs disagree on, and that no larger than 1"
        )
    if not 0 < power < 1:
        raise ValueError(f"power={power}; give a number between 0 and 1")
    spread = Z95 * math.sqrt(discordant) + NormalDist().inv_cdf(power) * math.sqrt(discordant - size**2)
    return math.ceil(design_effect * max(spread, 0.0) ** 2 / size**2)


def tango(gained: float, lost: float, total: float) -> tuple[float, float]:
    """Tango's 95 % score interval of (gained - lost) / total; the counts may be fractions of a pair."""

    def score(delta: float) -> float:
        slope = (2 * total - gained + lost) * delta - gained - lost
        root = math.sqrt(max(0.0, slope**2 + 8 * total * lost * delta * (1 - delta)))
        fewer = (root - slope) / (4 * total)
        variance = total * (2 * fewer + delta * (1 - delta))
        distance = gained - lost - total * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    def where(target: float) -> float:
        below, above = -1.0, 1.0
        while above - below > 1e-12:
            middle = (below + above) / 2
            below, above = (middle, above) if score(middle) > target else (below, middle)
        return (below + above) / 2

    mean = (gained - lost) / total
    return min(mean, where(Z95)), max(mean, where(-Z95))


def _design_effect(differences: Sequence[int], clusters: Sequence[Hashable]) -> tuple[float, int]:
    """(design effect, number of clusters)."""
    total, mean = len(differences), sum(differences) / len(differences)
    members = Counter(clusters)
    count = len(members)
    if len(set(differences)) == 1 or count == 1:
        return total / count, count
    residuals = [value - mean * members[cluster] for cluster, value in _sums(differences, clusters).items()]
    clustered = count / (count - 1) * math.fsum(r * r for r in residuals) / total**2
    independent = math.fsum((d - mean) ** 2 for d in differences) / (total - 1) / total
    return max(1.0, clustered / independent), count


def _sums(differences: Sequence[int], clusters: Sequence[Hashable]) -> dict[Hashable, int]:
    sums: defaultdict[Hashable, int] = defaultdict(int)
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster] += difference
    return sums
