"""What a file of predictions comes to, as JSON, as Markdown and for the terminal; ``page`` makes HTML of
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qwenvl_eval.judge import Judge
from qwenvl_eval.scoring import Accuracy, BlindAnswers, Outcome, accuracy, exact_match
from qwenvl_eval.store import Prediction, Predictions, Run
from qwenvl_eval.summary import (
    Flip,
    Speed,
    Summary,
    Table,
    check_complete,
    flips,
    judge,
    protocols_of,
    speed,
    summarise,
    with_judge,
)
from qwenvl_eval.task import Task

MOST_ERRORS = 10


@dataclass(frozen=True)
class Report:
    """``summaries``: one a protocol, the first is the headline; ``outcomes`` are that one's, in the order of
    the predictions. ``errors``: what failed or was refused, most first.
    """

    title: str
    file: str
    run: Run
    summaries: tuple[Summary, ...]
    outcomes: tuple[Outcome, ...]
    flips: tuple[Flip, ...]
    speed: Speed
    errors: tuple[tuple[str, int], ...]

    @property
    def headline(self) -> Summary:
        return self.summaries[0]


def build(
    task: Task, predictions: Predictions, protocol: str = "all", judge_model: Judge | None = None
) -> Report:
    """Score a complete file. ``protocol``: a name, "all", or "" for the headline's.

    With ``judge_model`` the task's ``judged`` protocol stands there once more, with the judge deciding what
    it could not; where a name or "" was given, that is the only protocol. Raises ValueError for a file with
    predictions missing, an unknown protocol, and a task that has nothing for a judge; BackendError for a
    judge that does not answer.
    """
    check_complete(predictions)
    judged = {name: judge(task, name, predictions) for name in protocols_of(task, protocol)}
    errors = Counter(p.error for p in predictions if p.error)
    if judge_model is not None:
        if not task.judged:
            raise ValueError(f"{task.title} has no protocol that a judge model could complete")
        rows = judged.get(task.judged) or judge(task, task.judged, predictions)
        rows, rulings = with_judge(task, judge_model, predictions, rows)
        name = f"{task.judged} + {judge_model.name}"
        judged = {**(judged if protocol == "all" else {}), name: rows}
        errors[f"the judge {judge_model.name} did not reply"] += rulings.failed
        errors[f"the judge {judge_model.name} replied with what is no ruling"] += rulings.unreadable
    errors = +errors
    return Report(
        title=task.title,
        file=str(predictions.path),
        run=predictions.run,
        summaries=tuple(summarise(task, name, rows) for name, rows in judged.items()),
        outcomes=tuple(row.verdict.outcome for row in next(iter(judged.values()))),
        flips=tuple(flips(judged)) if len(judged) > 1 else (),
        speed=speed(predictions),
        errors=tuple(errors.most_common(MOST_ERRORS)),
    )


def blind_accuracy(predictions: Iterable[Prediction], training: Iterable[tuple[str, str]]) -> Accuracy:
    """The same questions answered without looking: see :class:`~qwenvl_eval.scoring.BlindAnswers`."""
    blind = BlindAnswers(training)
    rows = [
        (exact_match(blind.answer(p.target["question"]), p.target["answer"]), p.cluster) for p in predictions
    ]
    return accuracy([right for right, _ in rows], [cluster for _, cluster in rows])


def as_json(report: Report) -> dict[str, Any]:
    """Everything, with shares in 0..1."""
    return {
        "task": report.title,
        "predictions": report.file,
        "run": asdict(report.run),
        "protocols": {summary.protocol: _summary_json(summary) for summary in report.summaries},
        "flips": [
            {"id": f.id, "replicate": f.replicate, "verdicts": {k: asdict(v) for k, v in f.verdicts.items()}}
            for f in report.flips
        ],
        "speed": asdict(report.speed),
        "errors": dict(report.errors),
    }


def as_text(report: Report) -> str:
    """For the terminal."""
    run, first = report.run, report.headline
    lines = [
        ("predictions", f"{report.file} by {run.model}"),
        ("questions", f"{first.accuracy.total} about {first.accuracy.clusters} pictures or videos"),
    ]
    for summary in report.summaries:
        name = "accuracy" if summary is first else ""
        lines.append((name, f"{summary.accuracy} ({summary.protocol}{_bracket(summary)}; 95 % interval)"))
        lines += [("", f"{m.name} {m.value:.3f}{f' ({m.note})' if m.note else ''}") for m in summary.metrics]
    lines.append(("outcomes", _outcomes(first)))
    if first.cut:
        limit = run.sampling.get("max_new_tokens", "the model's limit of")
        lines.append(("cut off", f"{first.cut} answers at {limit} tokens"))
    if first.spread is not None:
        lines.append(("replicates", f"{run.replicates}, standard deviation {100 * first.spread:.2f} %"))
    if len(report.summaries) > 1:
        lines.append(("flips", f"{len(report.flips)} samples are right under one protocol only"))
    lines += [("error", f"{count} times: {error}") for error, count in report.errors]
    lines.append(("speed", f"{report.speed.samples:.1f} samples/s, {report.speed.tokens:,.0f} tokens/s"))
    notes = ("", *first.notes) if first.notes else ()
    return "\n".join((*(f"{name:16} {value}" for name, value in lines), *notes))


def as_markdown(report: Report) -> str:
    """Tables; the headline's first."""
    run = report.run
    parts = [
        f"# {report.title}: {run.model}",
        "",
        "| protocol | accuracy | 95 % interval | best case | outcomes |",
    ]
    parts.append("|---|---|---|---|---|")
    for s in report.summaries:
        value, low, high, best = (
            100 * v for v in (s.accuracy.value, s.accuracy.low, s.accuracy.high, s.best)
        )
        cells = (s.protocol, f"{value:.1f} %", f"{low:.1f} to {high:.1f} %", f"{best:.1f} %", _outcomes(s))
        parts.append(f"| {' | '.join(cells)} |")
    for s in report.summaries:
        for m in s.metrics:
            parts += ["", f"**{m.name}** ({s.protocol}): {m.value:.3f}{f'. {m.note}' if m.note else ''}"]
            if m.parts:
                parts += ["", "| | |", "|---|---|", *(f"| {k} | {v:.3f} |" for k, v in m.parts.items())]
    parts += ["", *report.headline.notes] if report.headline.notes else []
    for table in report.headline.tables:
        parts += ["", f"## By {' and '.join(table.groups)} ({report.headline.protocol})", "", *_table(table)]
    if report.flips:
        parts += ["", f"## {len(report.flips)} samples on which the protocols disagree", ""]
        names = [s.protocol for s in report.summaries]
        parts += [f"| id | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        parts += [
            f"| {_cell(f.id)} | {' | '.join(f.verdicts[name].outcome for name in names)} |"
            for f in report.flips
        ]
    versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    parts += [
        "",
        "## How",
        "",
        f"{run.samples} samples, {run.replicates} times each, sampling {dict(run.sampling)},",
    ]
    parts += [f"options {dict(run.options)}.", f"Weights {run.weights}, data {run.data_sha256} (SHA-256),"]
    parts += [f"engine {run.engine}, code {run.revision or 'unknown'}, {versions}."]
    return "\n".join(parts) + "\n"


def _table(table: Table) -> list[str]:
    """One group: a row each. Two groups: rows and columns."""
    if len(table.groups) == 1:
        rows = [f"| {_cell(values[0])} | {cell.total} | {cell} |" for values, cell in table.cells.items()]
        return [f"| {table.groups[0]} | samples | accuracy |", "|---|---|---|", *rows]
    columns = sorted({values[1] for values in table.cells})
    lines = [f"| | {' | '.join(map(_cell, columns))} |", "|---" * (len(columns) + 1) + "|"]
    for row in sorted({values[0] for values in table.cells}):
        cells = [table.cells.get((row, column)) for column in columns]
        lines.append(
            f"| {row} | {' | '.join(f'{100 * c.value:.1f} % of {c.total}' if c else '' for c in cells)} |"
        )
    return lines


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _summary_json(summary: Summary) -> dict[str, Any]:
    return {
        "accuracy": _accuracy_json(summary.accuracy),
        "outcomes": {outcome.value: summary.outcomes.get(outcome, 0) for outcome in Outcome},
        "cut": summary.cut,
        "worst": summary.accuracy.value,
        "expected": summary.expected,
        "best": summary.best,
        "spread": summary.spread,
        "metrics": [asdict(metric) for metric in summary.metrics],
        "tables": [
            {
                "groups": list(table.groups),
                "rows": [{"values": list(v), **_accuracy_json(cell)} for v, cell in table.cells.items()],
            }
            for table in summary.tables
        ],
    }


def _accuracy_json(accuracy: Accuracy) -> dict[str, Any]:
    return {**asdict(accuracy), "value": accuracy.value}


def _outcomes(summary: Summary) -> str:
    return ", ".join(
        f"{summary.outcomes[outcome]} {outcome}" for outcome in Outcome if summary.outcomes.get(outcome)
    )


def _bracket(summary: Summary) -> str:
    """What guessing would have made of it, where the published code guesses."""
    if summary.best == summary.accuracy.value:
        return ""
    best, expected = 100 * summary.best, 100 * summary.expected
    return f", never guessing; with guesses up to {best:.1f} %, {expected:.1f} % expected"
