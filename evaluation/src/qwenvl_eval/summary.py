"""From predictions to numbers: verdicts under each protocol, and what they come to.

Predictions -> judge(task, protocol) -> Judged -> summarise -> Summary
                        \\-> several protocols -> flips: the samples that they disagree about
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qwenvl_eval.judge import Case, Judge, Rulings
from qwenvl_eval.scoring import Accuracy, Outcome, Scorer, Verdict, accuracy
from qwenvl_eval.store import Prediction, Predictions
from qwenvl_eval.task import Judged, Metric, Task


@dataclass(frozen=True)
class Table:
    """The headline broken down: ``cells[values of the groups]``, in the order of the names."""

    groups: tuple[str, ...]
    cells: Mapping[tuple[str, ...], Accuracy]


@dataclass(frozen=True)
class Summary:
    """What a run comes to under one protocol.

    ``accuracy``: right answers over all that were to be asked, its interval clustered by picture or video.
    ``outcomes`` count every prediction once. ``cut``: answers cut at the token limit, whatever became of
    them. Where the protocol's published code guesses, ``best`` and ``expected`` are what luck and the mean
    of luck would have made of the headline, which never guesses and is the worst case. ``spread``: standard
    deviation of the accuracy over replicates, None for one.
    ``notes``: the task's own lines of Markdown.
    """

    protocol: str
    accuracy: Accuracy
    outcomes: Mapping[Outcome, int]
    cut: int
    best: float
    expected: float
    spread: float | None
    tables: tuple[Table, ...]
    metrics: tuple[Metric, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """``tokens`` counts prompt and answer; both include loading the media, not the model."""

    samples: float
    tokens: float


@dataclass(frozen=True)
class Flip:
    """A sample that protocols disagree about."""

    id: str
    replicate: int
    verdicts: Mapping[str, Verdict]


def verdict_of(task: Task, protocol: str, prediction: Prediction) -> Verdict:
    """What a protocol says of a prediction, answered or not."""
    match prediction.finish_reason:
        case "refused":
            return Verdict(Outcome.REFUSED)
        case "failed":
            return Verdict(Outcome.FAILED)
        case "length":
            read = task.scorers[protocol](prediction.answer, prediction.target)
            kept = protocol in task.reads_truncated and read.right
            return read if kept else Verdict(Outcome.TRUNCATED, read.extracted)
    return task.scorers[protocol](prediction.answer, prediction.target)


def judge(task: Task, protocol: str, predictions: Iterable[Prediction]) -> list[Judged]:
    """Every prediction with its verdict. Raises ValueError for a protocol that the task has not."""
    check_protocol(task, protocol)
    return [
        Judged(
            p.id,
            p.replicate,
            p.target,
            p.cluster,
            p.groups,
            p.finish_reason == "length",
            verdict_of(task, protocol, p),
        )
        for p in predictions
    ]


def with_judge(
    task: Task, judge_model: Judge, predictions: Iterable[Prediction], judged: Sequence[Judged]
) -> tuple[list[Judged], Rulings]:
    """``judged`` under ``task.judged``, with the judge's verdict where the protocol came to none."""
    places, cases = [], []
    for place, (prediction, row) in enumerate(zip(predictions, judged, strict=True)):
        if row.verdict.outcome in task.undecided:
            places.append(place)
            cases.append(Case(question_text(prediction), prediction.answer, prediction.target))
    rulings = judge_model.rule(cases)
    result = list(judged)
    for place, verdict in zip(places, rulings.verdicts, strict=True):
        result[place] = replace(judged[place], verdict=verdict)
    return result, rulings


def question_text(prediction: Prediction) -> str:
    """The text of the last turn, without its media."""
    content = prediction.prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(item["text"] for item in content if item["type"] == "text").strip()


def check_protocol(task: Task, protocol: str) -> None:
    """Raises ValueError for a protocol that the task has not."""
    if protocol not in task.scorers:
        raise ValueError(f"{task.title} has no protocol {protocol!r}; it has {', '.join(task.scorers)}")


def check_complete(predictions: Predictions) -> None:
    """Raises ValueError where predictions are missing: the denominator is what was to be asked."""
    run = predictions.run
    if len(predictions) != run.samples * run.replicates:
        raise ValueError(
            f"{predictions.path}: {len(predictions)} of {run.samples * run.replicates} predictions are "
            "there; start the same `qwenvl-eval infer` again, it goes on where it was"
        )


def summarise(task: Task, protocol: str, judged: Sequence[Judged]) -> Summary:
    """The figures of one protocol. Raises ValueError for no verdicts."""
    everything, judged = judged, task.headline(judged)
    total = len(judged)
    headline = _accuracy(judged)
    guessed = [j.verdict.chance for j in judged if j.verdict.outcome is Outcome.UNPARSED and j.verdict.chance]
    replicates: defaultdict[int, list[bool]] = defaultdict(list)
    for j in judged:
        replicates[j.replicate].append(j.verdict.right)
    spread = statistics.stdev(map(statistics.fmean, replicates.values())) if len(replicates) > 1 else None
    return Summary(
        protocol=protocol,
        accuracy=headline,
        outcomes=Counter(j.verdict.outcome for j in judged),
        cut=sum(j.truncated for j in judged),
        best=(headline.right + len(guessed)) / total,
        expected=(headline.right + sum(guessed)) / total,
        spread=spread,
        tables=tuple(table for groups in task.tables if (table := _table(groups, judged)).cells),
        metrics=tuple(task.metrics(protocol, judged)),
        notes=tuple(task.notes(everything)),
    )


def speed(predictions: Iterable[Prediction]) -> Speed:
    """How fast the answers came, all of them in one stretch."""
    count = tokens = 0
    seconds = 0.0
    for p in predictions:
        count, tokens = count + 1, tokens + p.prompt_tokens + p.completion_tokens
        seconds += p.seconds
    return Speed(count / seconds, tokens / seconds) if seconds else Speed(0.0, 0.0)


def flips(judged: Mapping[str, Sequence[Judged]]) -> list[Flip]:
    """The samples that are right under one of the protocols and not under another."""
    found = []
    for rows in zip(*judged.values(), strict=True):
        verdicts = {protocol: row.verdict for protocol, row in zip(judged, rows, strict=True)}
        if len({verdict.right for verdict in verdicts.values()}) > 1:
            found.append(Flip(rows[0].id, rows[0].replicate, verdicts))
    return found


def _table(groups: tuple[str, ...], judged: Sequence[Judged]) -> Table:
    """Samples without one of the groups stand in no cell."""
    cells: defaultdict[tuple[str, ...], list[Judged]] = defaultdict(list)
    for j in judged:
        if all(name in j.groups for name in groups):
            cells[tuple(j.groups[name] for name in groups)].append(j)
    return Table(groups, {values: _accuracy(cells[values]) for values in sorted(cells)})


def _accuracy(judged: Sequence[Judged]) -> Accuracy:
    return accuracy([j.verdict.right for j in judged], [j.cluster for j in judged])


def protocols_of(task: Task, chosen: str) -> dict[str, Scorer]:
    """``chosen``: "" for the headline's protocol, "all", or a name."""
    if chosen == "all":
        return dict(task.scorers)
    name = chosen or next(iter(task.scorers))
    check_protocol(task, name)
    return {name: task.scorers[name]}
