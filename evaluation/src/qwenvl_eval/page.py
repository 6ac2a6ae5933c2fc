"""The report as one HTML page that opens anywhere: figures, tables, and a browser of samples.

predictions -> choose -> cards (prompt, answer, verdicts) --\\
data --open, once--> thumbnails of the chosen samples ------> page.html.jinja -> one file, no address outside

What a model or a data set wrote is text on this page and nothing else: everything is escaped, and the page's
policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenvl_eval.report import Report
from qwenvl_eval.scoring import Outcome, Verdict
from qwenvl_eval.store import Prediction, Predictions, Run
from qwenvl_eval.summary import Table, verdict_of
from qwenvl_eval.task import Dataset, Task
from qwenvl_eval.thumbnails import Picture, Place, pictures_of, places_in

SAMPLES = 200
LONGEST_TEXT = 20_000
"""Characters of a prompt or an answer on the page; what is longer loses its middle."""

ANSWERED = (Outcome.RIGHT, Outcome.WRONG)


@dataclass(frozen=True)
class Turn:
    """A message of a prompt, as text."""

    role: str
    text: str


@dataclass(frozen=True)
class Card:
    """One prediction on the page.

    ``outcome`` is the headline protocol's. ``target`` is the answer that was wanted, ``given`` the whole JSON
    object that the protocols got. ``found`` and ``wanted`` are boxes to be drawn. ``filters`` are the numbers
    of its groups in :func:`_group_numbers`.
    """

    anchor: str
    prediction: Prediction
    outcome: Outcome
    verdicts: Mapping[str, Verdict]
    agreed: bool
    prompt: tuple[Turn, ...]
    answer: str
    reasoning: str
    target: str
    given: str
    pictures: tuple[Picture, ...]
    found: tuple[Place, ...]
    wanted: tuple[Place, ...]
    filters: tuple[int, ...]


def write_page(
    path: Path, report: Report, task: Task, predictions: Predictions, data: Path, samples: int = SAMPLES
) -> str:
    """Write the page; returns why it has no pictures, "" where it has them.

    ``data``: where the data lies now; its checksum must be the run's. ``samples``: how many predictions are
    shown at most.
    """
    chosen = _chosen(report, predictions, samples)
    dataset = open_data(task, data, predictions.run)
    note, pictures = "", {}
    if isinstance(dataset, str):
        note = dataset
    else:
        pictures = pictures_of(dataset, {p.index: p.prompt for p in chosen})
    path.write_text(render(report, task, chosen, pictures, note), encoding="utf-8")
    return note


def choose(outcomes: Sequence[Outcome], limit: int) -> list[int]:
    """Places of the outcomes to be shown, at most ``limit``: first what has no answer or no readable one, at
    most half of all while there are others; then wrong and right ones by turns, drawn with a fixed seed.
    """
    draw = random.Random(0)
    kinds: dict[str, list[int]] = {"errors": [], "wrong": [], "right": []}
    for place, outcome in enumerate(outcomes):
        kinds[outcome.value if outcome in ANSWERED else "errors"].append(place)
    for places in kinds.values():
        draw.shuffle(places)
    errors, wrong, right = kinds.values()
    first = max(limit // 2, limit - len(wrong) - len(right))
    shown = set(errors[:first])
    for turn in range(max(len(wrong), len(right))):
        for places in (wrong, right):
            if turn < len(places) and len(shown) < limit:
                shown.add(places[turn])
    return sorted(shown, key=lambda place: (outcomes[place] in ANSWERED, place))


def open_data(task: Task, data: Path, run: Run) -> Dataset | str:
    """The run's data, or why it is not to be had."""
    try:
        dataset = task.open(data)
        found = dataset.checksum()
    except (ValueError, OSError) as error:
        return f"{data} can't be read ({error}); say where the data is with --data-dir"
    if found != run.data_sha256:
        return (
            f"{data} is not the data of this run (SHA-256 {found[:12]}, the run's {run.data_sha256[:12]}); "
            "say where that is with --data-dir"
        )
    return dataset


def render(
    report: Report,
    task: Task,
    chosen: Sequence[Prediction],
    pictures: Mapping[int, tuple[Picture, ...]],
    note: str,
) -> str:
    """The page's HTML. ``pictures``: by the sample's index."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qwenvl_eval", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "count": _count, "script_hash": _script_hash}
    numbers = _group_numbers(chosen)
    cards = [_card(task, report, p, pictures.get(p.index, ()), numbers) for p in chosen]
    return environment.get_template("page.html.jinja").render(
        report=report,
        run=report.run,
        headline=report.headline,
        outcomes=list(Outcome),
        guesses=any(s.best > s.accuracy.value for s in report.summaries),
        tables=[_grid(report, table) for table in report.headline.tables],
        cards=cards,
        anchors={(c.prediction.id, c.prediction.replicate): c.anchor for c in cards},
        groups=_by_name(numbers),
        shown={outcome: sum(c.outcome is outcome for c in cards) for outcome in Outcome},
        disagree=sum(not c.agreed for c in cards),
        left_out=report.headline.accuracy.total - len(cards),
        note=note,
        provenance=_provenance(report),
    )


def _chosen(report: Report, predictions: Predictions, samples: int) -> list[Prediction]:
    places = choose(report.outcomes, samples)
    wanted = set(places)
    found = {place: p for place, p in enumerate(predictions) if place in wanted}
    return [found[place] for place in places]


def _card(
    task: Task,
    report: Report,
    prediction: Prediction,
    pictures: tuple[Picture, ...],
    numbers: Mapping[tuple[str, str], int],
) -> Card:
    verdicts = {s.protocol: verdict_of(task, s.protocol, prediction) for s in report.summaries}
    read = (places_in(verdict.extracted) for verdict in verdicts.values())
    target = prediction.target
    return Card(
        anchor=f"s{prediction.index}-{prediction.replicate}",
        prediction=prediction,
        outcome=verdicts[report.headline.protocol].outcome,
        verdicts={name: _shortened(verdict) for name, verdict in verdicts.items()},
        agreed=len({verdict.right for verdict in verdicts.values()}) == 1,
        prompt=tuple(_turn(message) for message in prediction.prompt),
        answer=_middle_out(prediction.answer),
        reasoning=_middle_out(prediction.reasoning),
        target=_middle_out(_target_text(target)),
        given=_middle_out(json.dumps(target, ensure_ascii=False, indent=1)),
        pictures=pictures,
        found=next((places for places in read if places), ()),
        wanted=places_in(target.get("truth")),
        filters=tuple(numbers[group] for group in prediction.groups.items()),
    )


def _shortened(verdict: Verdict) -> Verdict:
    return Verdict(verdict.outcome, _middle_out(verdict.extracted, 500), verdict.chance)


def _turn(message: Mapping[str, Any]) -> Turn:
    content = message["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join(item["text"] if item["type"] == "text" else f"[{item['type']}] " for item in items)
    return Turn(str(message["role"]), _middle_out(text))


def _target_text(target: Mapping[str, Any]) -> str:
    """The wanted answer, with the option's text where it is a letter; of boxes how many of which label; the
    whole target where it has neither.
    """
    if boxes := places_in(target.get("truth")):
        return ", ".join(f"{count} {label}" for label, count in Counter(b.label for b in boxes).items())
    if "answer" not in target:
        return json.dumps(target, ensure_ascii=False)
    answer, options = target["answer"], target.get("options")
    if isinstance(options, Mapping) and isinstance(answer, str) and answer in options:
        return f"{answer}. {options[answer]}"
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _middle_out(text: str, most: int = LONGEST_TEXT) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters are left out here …]\n{text[-half:]}"


def _group_numbers(chosen: Iterable[Prediction]) -> dict[tuple[str, str], int]:
    """A number for each group and value, so that no text of the data's is part of the page's code."""
    found = sorted({group for p in chosen for group in p.groups.items()})
    return {group: number for number, group in enumerate(found)}


def _by_name(numbers: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    names: dict[str, dict[str, int]] = {}
    for (name, value), number in numbers.items():
        names.setdefault(name, {})[value] = number
    return names


def _grid(report: Report, table: Table) -> dict[str, Any]:
    """One group: rows with the accuracy under every protocol. Two: rows and columns of the headline's."""
    if len(table.groups) == 1:
        others = [
            (summary.protocol, next(t.cells for t in summary.tables if t.groups == table.groups))
            for summary in report.summaries[1:]
        ]
        rows = [
            (values[0], cell, [cells[values] for _, cells in others]) for values, cell in table.cells.items()
        ]
        return {"groups": table.groups, "others": [name for name, _ in others], "rows": rows}
    columns = sorted({values[1] for values in table.cells})
    rows = [
        (row, [table.cells.get((row, column)) for column in columns])
        for row in sorted({values[0] for values in table.cells})
    ]
    return {"groups": table.groups, "columns": columns, "rows": rows}


def _provenance(report: Report) -> dict[str, str]:
    run = report.run
    told = {name: str(value) for name, value in asdict(run).items() if not isinstance(value, Mapping)}
    mappings = {"sampling": run.sampling, "options": run.options, "versions": run.versions}
    told |= {name: ", ".join(f"{k} {v}" for k, v in values.items()) for name, values in mappings.items()}
    told["predictions"] = report.file
    told["speed"] = f"{report.speed.samples:.1f} samples/s, {report.speed.tokens:,.0f} tokens/s"
    return {name.replace("_", " "): value or "not known" for name, value in told.items()}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _script_hash(script: str) -> str:
    """What a content security policy calls a script."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
