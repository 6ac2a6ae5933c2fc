"""Two runs on the same questions: which one is better, and whether that is chance.

    Predictions, Predictions -> the same task, options and data? -> verdicts, pair by pair -> RunComparison

The statistics are those of :mod:`qwenvl_eval.scoring.paired`. Replicates of a question are pairs of their own
about the same picture, so the difference is that of the averages, and the interval and the permutation test,
which take pictures as a whole, stay right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwenvl_eval.scoring import Accuracy, Verdict, accuracy
from qwenvl_eval.scoring.paired import Comparison, compare
from qwenvl_eval.store import Predictions, Run
from qwenvl_eval.summary import check_complete, check_protocol, judge
from qwenvl_eval.task import Judged, Task

SAME = ("task", "options", "data_sha256", "samples", "replicates")
"""Fields of a run that two runs must share to be compared."""

POINTS = 0.02
"""The difference in accuracy for which the number of questions is told."""


@dataclass(frozen=True)
class Contrast:
    """Both accuracies and their difference, second minus first."""

    first: Accuracy
    second: Accuracy
    paired: Comparison


@dataclass(frozen=True)
class Flip:
    """A question that one of the runs alone got right."""

    id: str
    replicate: int
    groups: Mapping[str, str]
    first: Verdict
    second: Verdict


@dataclass(frozen=True)
class RunComparison:
    """``files`` and ``runs``: the first and the second. ``group``: the one that ``rows`` break it down by, ""
    where there is none. ``questions``: how many show a true difference of ``POINTS`` with 80 % power.
    """

    title: str
    protocol: str
    files: tuple[str, str]
    runs: tuple[Run, Run]
    overall: Contrast
    questions: int
    group: str
    rows: Mapping[str, Contrast]
    flips: tuple[Flip, ...]


def compare_runs(
    first: Predictions, second: Predictions, task_of: Callable[[Run], Task], protocol: str = ""
) -> RunComparison:
    """``task_of``: the task of a run. ``protocol``: "" for the headline's.

    Raises ValueError for runs that asked different questions, for predictions that are missing and for an
    unknown protocol.
    """
    check_same(first, second)
    for predictions in (first, second):
        check_complete(predictions)
    task = task_of(first.run)
    name = protocol or next(iter(task.scorers))
    check_protocol(task, name)
    judged = judge(task, name, first), judge(task, name, second)
    pairs = list(zip(*judged, strict=True))
    _check_pairs(pairs, second)
    overall = _contrast(pairs)
    group = task.tables[0][0] if task.tables else ""
    parts: defaultdict[str, list[tuple[Judged, Judged]]] = defaultdict(list)
    for pair in pairs:
        if group in pair[0].groups:
            parts[pair[0].groups[group]].append(pair)
    return RunComparison(
        title=task.title,
        protocol=name,
        files=(str(first.path), str(second.path)),
        runs=(first.run, second.run),
        overall=overall,
        questions=math.ceil(overall.paired.questions_for(POINTS) / first.run.replicates),
        group=group if parts else "",
        rows={value: _contrast(parts[value]) for value in sorted(parts)},
        flips=tuple(
            Flip(a.id, a.replicate, a.groups, a.verdict, b.verdict)
            for a, b in pairs
            if a.verdict.right != b.verdict.right
        ),
    )


def check_same(first: Predictions, second: Predictions) -> None:
    """Raises ValueError, naming what differs, for runs that did not ask the same questions."""
    mine, theirs = asdict(first.run), asdict(second.run)
    differs = []
    for name in SAME:
        one, other = mine[name], theirs[name]
        if one != other and isinstance(one, Mapping):
            names = sorted({*one, *other})
            differs += [
                f"option {n} {one.get(n)!r} and {other.get(n)!r}" for n in names if one.get(n) != other.get(n)
            ]
        elif one != other:
            differs.append(f"{name} {str(one)[:60]} and {str(other)[:60]}")
    if differs:
        raise ValueError(
            f"{first.path} and {second.path} did not ask the same questions: {'; '.join(differs)}; "
            "compare runs of the same task, options and data"
        )


def as_text(found: RunComparison) -> str:
    """For the terminal."""
    whole, paired, run = found.overall, found.overall.paired, found.runs[0]
    mcnemar = f"p = {paired.mcnemar:.3g}, exact, were all questions independent"
    if run.replicates > 1:
        mcnemar = "not told: replicates of a question are not independent"
    times = f", {run.replicates} times each" if run.replicates > 1 else ""
    lines = {
        "first": f"{whole.first}  {found.files[0]} by {found.runs[0].model}",
        "second": f"{whole.second}  {found.files[1]} by {found.runs[1].model}",
        "asked": f"{run.samples:,} questions about {paired.clusters:,} pictures or videos{times}; "
        f"{found.title}, protocol {found.protocol}",
        "difference": f"{_points(paired)}, second minus first; 95 % interval",
        "right": f"{paired.only_first:,} answers of the first alone, {paired.only_second:,} of the second "
        f"alone, {paired.both:,} of both, {paired.neither:,} of neither",
        "permutation": f"p = {paired.sign_flip:.3g}, exact, pictures taken as a whole",
        "McNemar": mcnemar,
        "power": f"to see {100 * POINTS:.0f} points with 80 % you need about {found.questions:,} questions",
        "so": _conclusion(paired),
    }
    return "\n".join([*(f"{name:12} {value}" for name, value in lines.items()), *_table(found)])


def as_json(found: RunComparison) -> dict[str, Any]:
    """Everything, with shares in 0..1."""
    return {
        "task": found.title,
        "protocol": found.protocol,
        "predictions": list(found.files),
        "runs": [asdict(run) for run in found.runs],
        **_contrast_json(found.overall),
        "questions_needed": {"difference": POINTS, "power": 0.8, "questions": found.questions},
        "group": found.group,
        "by_group": {value: _contrast_json(row) for value, row in found.rows.items()},
        "flips": [asdict(flip) for flip in found.flips],
    }


def _contrast(pairs: Sequence[tuple[Judged, Judged]]) -> Contrast:
    clusters = [a.cluster for a, _ in pairs]
    first, second = [a.verdict.right for a, _ in pairs], [b.verdict.right for _, b in pairs]
    return Contrast(accuracy(first, clusters), accuracy(second, clusters), compare(first, second, clusters))


def _check_pairs(pairs: Sequence[tuple[Judged, Judged]], second: Predictions) -> None:
    for a, b in pairs:
        if (a.id, a.replicate, a.cluster) != (b.id, b.replicate, b.cluster):
            raise ValueError(
                f"{second.path}: sample {b.id} replicate {b.replicate} stands where the other file has "
                f"{a.id} replicate {a.replicate}; make one of them again"
            )


def _table(found: RunComparison) -> list[str]:
    if not found.rows:
        return []
    rows = [[found.group, "answers", "first", "second", "difference"]]
    for value, row in found.rows.items():
        shares = [f"{100 * side.value:.1f} %" for side in (row.first, row.second)]
        rows.append([value, f"{row.first.total:,}", *shares, _points(row.paired)])
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(wide[0]), *(row[n].rjust(wide[n]) for n in (1, 2, 3)), row[4]])
        for row in rows
    ]
    return ["", *lines]


def _points(paired: Comparison) -> str:
    return f"{100 * paired.difference:+.1f} points [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"


def _conclusion(paired: Comparison) -> str:
    if paired.sign_flip >= 0.05:
        return "no evidence that either is better: chance alone may well do this"
    return f"the {'second' if paired.difference > 0 else 'first'} is better; chance alone rarely does this"


def _contrast_json(contrast: Contrast) -> dict[str, Any]:
    return {
        "first": {**asdict(contrast.first), "value": contrast.first.value},
        "second": {**asdict(contrast.second), "value": contrast.second.value},
        "paired": asdict(contrast.paired),
    }
