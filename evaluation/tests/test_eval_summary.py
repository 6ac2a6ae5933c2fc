"""From predictions to figures: outcomes, the bracket of guessing, spread over replicates, tables, flips."""

from collections import Counter
from dataclasses import dataclass
from statistics import stdev
from typing import ClassVar

import pytest

from qwenvl_eval import Dataset, Prediction, Predictions, Run, Store, Task, build
from qwenvl_eval.report import as_json, as_markdown, as_text
from qwenvl_eval.scoring import Outcome, Verdict


def guessing(answer, target):
    if answer == "?":
        return Verdict(Outcome.UNPARSED, chance=0.25)
    return Verdict(Outcome.RIGHT if target["answer"] in answer else Outcome.WRONG, answer)


def exact(answer, target):
    return Verdict(Outcome.RIGHT if answer == target["answer"] else Outcome.WRONG, answer)


@dataclass(frozen=True)
class Letters(Task):
    title = "Letters"
    protocols: ClassVar = {"published": guessing, "strict": exact}
    tables = (("kind",), ("kind", "size"))
    reads_truncated = frozenset({"published"})

    def open(self, data):
        return Dataset((), 0, lambda: iter(()))


ROWS = [  # answer, finish_reason, groups; "b" is right everywhere
    ("b", "stop", {"kind": "x", "size": "s"}),
    ("maybe b", "stop", {"kind": "x", "size": "l"}),
    ("a", "stop", {"kind": "y|z", "size": "s"}),
    ("?", "stop", {"kind": "y|z", "size": "s"}),
    ("it is b", "length", {}),
    ("let me think", "length", {}),
    ("", "refused", {}),
    ("", "failed", {}),
]


def write(path, rows=ROWS, replicates=1):
    run = Run("letters", {}, "m", "w", "d", "s", len(rows) // replicates, {"max_new_tokens": 9}, replicates)
    with Store(path, run) as store:
        for number, (answer, reason, groups) in enumerate(rows):
            index, replicate = divmod(number, replicates)
            error = "it broke" if reason in ("refused", "failed") else ""
            store.add([Prediction(
                id=f"q{index}", index=index, replicate=replicate, key=f"{number:064x}"[::-1], prompt=[],
                media=[],
                answer=answer, reasoning="", finish_reason=reason, error=error, prompt_tokens=3,
                completion_tokens=1, seconds=0.5, target={"answer": "b"}, cluster=str(index), groups=groups,
            )])  # fmt: skip
    return Predictions(path)


def test_every_prediction_has_one_outcome_and_the_denominator_stays(tmp_path):
    report = build(Letters(), write(tmp_path / "p.jsonl"))
    published, strict = report.summaries
    assert published.outcomes == Counter(right=3, wrong=1, unparsed=1, truncated=1, refused=1, failed=1)
    assert strict.outcomes == Counter(right=1, wrong=3, truncated=2, refused=1, failed=1)
    assert (published.accuracy.value, strict.accuracy.value) == (3 / 8, 1 / 8)
    assert published.cut == strict.cut == 2


def test_the_headline_never_guesses_and_the_bracket_says_what_luck_would_do(tmp_path):
    report = build(Letters(), write(tmp_path / "p.jsonl"))
    published, strict = report.summaries
    assert (published.expected, published.best) == (3.25 / 8, 4 / 8)
    assert strict.expected == strict.best == 1 / 8
    assert "never guessing; with guesses up to 50.0 %, 40.6 % expected" in as_text(report)


def test_protocols_that_disagree_are_listed(tmp_path):
    report = build(Letters(), write(tmp_path / "p.jsonl"))
    assert [flip.id for flip in report.flips] == ["q1", "q4"]
    assert as_json(report)["flips"][1]["verdicts"]["strict"]["outcome"] == "truncated"


def test_tables_count_those_that_have_the_groups(tmp_path):
    report = build(Letters(), write(tmp_path / "p.jsonl"))
    one, two = report.headline.tables
    assert {values: (cell.right, cell.total) for values, cell in one.cells.items()} == {
        ("x",): (2, 2), ("y|z",): (0, 2),
    }  # fmt: skip
    assert {values: cell.total for values, cell in two.cells.items()} == {
        ("x", "s"): 1, ("x", "l"): 1, ("y|z", "s"): 2,
    }  # fmt: skip
    assert r"| y\|z | 2 |" in as_markdown(report)


def test_replicates_have_a_spread_and_one_run_has_none(tmp_path):
    rows = [("b", "stop", {}), ("a", "stop", {}), ("b", "stop", {}), ("b", "stop", {})]
    report = build(Letters(), write(tmp_path / "two.jsonl", rows, replicates=2), "strict")
    assert report.headline.spread == pytest.approx(stdev([1.0, 0.5]))
    assert report.headline.accuracy.clusters == 2
    assert "2, standard deviation 35.36 %" in as_text(report)
    assert build(Letters(), write(tmp_path / "one.jsonl")).headline.spread is None


def test_reasons_of_failures_and_speed_are_told(tmp_path):
    report = build(Letters(), write(tmp_path / "p.jsonl"), "strict")
    assert report.errors == (("it broke", 2),)
    assert (report.speed.samples, report.speed.tokens) == (2.0, 8.0)


def test_a_file_with_answers_missing_has_no_score(tmp_path):
    found = write(tmp_path / "p.jsonl")
    lines = found.path.read_text().splitlines(keepends=True)
    found.path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="7 of 8 predictions are there"):
        build(Letters(), Predictions(found.path))
