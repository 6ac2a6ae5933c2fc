"""Accuracy with a 95 % interval that knows that questions about one picture are not independent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Accuracy:
    """``right`` of ``total`` answers about ``clusters`` pictures; ``low`` and ``high`` lie in 0..1."""

    right: int
    total: int
    clusters: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.total

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def accuracy(verdicts: Sequence[bool], clusters: Sequence[Hashable]) -> Accuracy:
    """The share of right verdicts; ``clusters[i]`` is the picture verdict i is about.

    The interval is Wilson's at the effective sample size n / d (Korn and Graubard 1998). d, the design
    effect, is the cluster-robust variance of the mean over the variance of independent verdicts, and never
    below 1. Where all verdicts agree the data says nothing about d, and the number of clusters stands for the
    effective size.
    Raises ValueError for no verdicts and for lengths that differ.
    """
    total = len(verdicts)
    if total == 0:
        raise ValueError("accuracy of no verdicts: there is nothing to score")
    if len(clusters) != total:
        raise ValueError(f"{total} verdicts but {len(clusters)} clusters; give one cluster per verdict")
    right = sum(map(bool, verdicts))
    mean = right / total
    residuals: defaultdict[Hashable, float] = defaultdict(float)
    for verdict, cluster in zip(verdicts, clusters, strict=True):
        residuals[cluster] += verdict - mean
    count = len(residuals)
    if right in (0, total) or count == 1:
        effective = float(count)
    else:
        clustered = count / (count - 1) * sum(r * r for r in residuals.values()) / total**2
        independent = mean * (1 - mean) / (total - 1)
        effective = total / max(1.0, clustered / independent)
    low, high = wilson(mean, effective)
    return Accuracy(right, total, count, low, high)


def mean_interval(scores: Sequence[float], *, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of independent scores in 0..1.

    Wilson's where every score is 0 or 1, and where all are the same; else the percentile bootstrap, seeded.
    Raises ValueError for no scores.
    """
    if not scores:
        raise ValueError("the mean of no scores: there is nothing to score")
    mean = sum(scores) / len(scores)
    if set(scores) <= {0, 1} or len(set(scores)) == 1:
        return wilson(mean, len(scores))
    random = Random(0)
    means = sorted(sum(random.choices(scores, k=len(scores))) / len(scores) for _ in range(resamples))
    return means[round(0.025 * (resamples - 1))], means[round(0.975 * (resamples - 1))]


def wilson(mean: float, size: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share ``mean`` seen in ``size`` independent trials."""
    scale = 1 + Z95**2 / size
    centre = (mean + Z95**2 / (2 * size)) / scale
    half = Z95 / scale * math.sqrt(mean * (1 - mean) / size + Z95**2 / (4 * size**2))
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))
