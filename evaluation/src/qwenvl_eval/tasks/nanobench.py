"""nanobench: what a small model can do, skill by skill, beside what takes no looking.

    FOLDER/count.jsonl (python -m qwenvl.nano.bench FOLDER)
    -> each question twice: with its pictures, and with plain grey ones in their place
    -> a table: score, without the picture, the constant answer, what is claimed

A row is a conversation in the training format with ``skill``, ``metric``, ``target``, ``constant`` and
``grey`` (media of the same sizes). Grey media, not none: the prompt then differs in nothing but what is to be
seen, so that a low score says that the model looked and not that it was asked in a form it never met.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qwen_vl_serve import Sampling
from qwenvl_eval.scoring import Scorer
from qwenvl_eval.scoring.intervals import mean_interval
from qwenvl_eval.scoring.skills import METRICS, graded
from qwenvl_eval.task import Dataset, Judged, Sample, Task
from qwenvl_eval.tasks.conversations import PLACEHOLDER, read_rows

MARGIN = 0.2
"""A skill is claimed where its score lies so far above both others."""

FIELDS = ("id", "skill", "metric", "target", "constant", "conversations", "grey")


@dataclass(frozen=True)
class Nanobench(Task):
    """Skills of a small model, with and without the picture."""

    title: ClassVar[str] = "nanobench"
    protocols: ClassVar[Mapping[str, Scorer]] = {"graded": graded}
    tables: ClassVar[tuple[tuple[str, ...], ...]] = (("skill",),)
    presets: ClassVar[Mapping[str, Sampling]] = {"greedy": Sampling(temperature=0, max_new_tokens=256)}

    def open(self, data: Path) -> Dataset:
        """``data``: the folder that ``python -m qwenvl.nano.bench`` wrote. Raises ValueError, naming file and
        line, for a row that is not of it.
        """
        files = tuple(sorted(data.glob("*.jsonl")))
        if not files:
            raise ValueError(f"{data}: no .jsonl in it; write them with `python -m qwenvl.nano.bench {data}`")
        size = sum(1 for _ in _samples(files))
        return Dataset(files, size, lambda: _samples(files))

    def headline(self, judged: Sequence[Judged]) -> Sequence[Judged]:
        """The answers to real pictures."""
        return [row for row in judged if row.groups["look"] == "picture"]

    def notes(self, judged: Sequence[Judged]) -> list[str]:
        """The table."""
        rows: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in judged:
            look = row.groups["look"]
            rows[row.groups["skill"]][look].append(row.verdict.score or 0.0)
            if look == "picture":
                constant = METRICS[row.target["metric"]](row.target["constant"], row.target)
                rows[row.groups["skill"]]["constant"].append(constant)
        lines = [
            "| skill | questions | score, 95 % interval | without the picture | constant answer | claimed |",
            "|---|---|---|---|---|---|",
        ]
        return lines + [_line(skill, scores) for skill, scores in rows.items()]


def _line(skill: str, scores: Mapping[str, Sequence[float]]) -> str:
    means = {look: sum(found) / len(found) for look, found in scores.items()}
    low, high = (100 * side for side in mean_interval(scores["picture"]))
    claimed = means["picture"] - max(means["blind"], means["constant"]) >= MARGIN - 1e-9
    cells = (
        skill, str(len(scores["picture"])), f"{100 * means['picture']:.1f} % [{low:.1f}, {high:.1f}]",
        f"{100 * means['blind']:.1f} %", f"{100 * means['constant']:.1f} %", "yes" if claimed else "no",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _samples(files: Sequence[Path]) -> Iterator[Sample]:
    for path in files:
        for where, row in read_rows(path):
            missing = [name for name in FIELDS if not isinstance(row, dict) or name not in row]
            if missing:
                raise ValueError(
                    f"{where}: not a row of nanobench, it lacks {missing}; write the folder anew"
                )
            if row["metric"] not in METRICS:
                raise ValueError(f"{where}: metric is {row['metric']!r}; there are {', '.join(METRICS)}")
            yield _sample(row, path.parent, where, "picture")
            yield _sample(row, path.parent, where, "blind")


def _sample(row: dict[str, Any], folder: Path, where: str, look: str) -> Sample:
    kind = "image" if "image" in row else "video"
    media = row[kind] if look == "picture" else row["grey"]
    paths = [folder / name for name in media]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{where}: no such file {path}; write the folder anew")
    waiting = iter(paths)
    content: list[dict[str, Any]] = []
    for place, piece in enumerate(PLACEHOLDER.split(row["conversations"][0]["value"])):
        if place % 2:
            content.append({"type": kind, kind: str(next(waiting))})
        elif piece:
            content.append({"type": "text", "text": piece})
    target = {**row["target"], "metric": row["metric"], "constant": row["constant"]}
    groups = {"skill": row["skill"], "look": look}
    return Sample(f"{row['id']}/{look}", [{"role": "user", "content": content}], target, row["id"], groups)
