"""MMMU (Yue et al. 2024, arXiv 2311.16502): college questions of 30 subjects, most with options.

Read from MMMU_DEV_VAL.tsv as OpenCompass publishes it. The numbers in use are those of the validation split,
900 questions; the 150 of the dev split are examples to show a model and are never counted with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qwen_vl_serve import Sampling
from qwenvl_eval.data import (
    Row,
    Table,
    dataset_of,
    interleave,
    locate_tsv,
    mentioned,
    question_text,
    text_list,
)
from qwenvl_eval.presets import INSTRUCT, THINK
from qwenvl_eval.scoring import Scorer, choice, mmmu
from qwenvl_eval.task import Dataset, Judged, Metric, Sample, Task, option

DISCIPLINES = {
    "Art & Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health & Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
    ),
    "Humanities & Social Science": "History Literature Psychology Sociology",
    "Tech & Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
        "Mechanical_Engineering"
    ),
}
"""Discipline -> its subjects, as the paper groups them."""

DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}

LETTER = "Answer with the letter of the right option and nothing else."
SHORT = "Answer with a single word, number or short phrase."
COT = (
    'Reason step by step. Then write a last line "Answer: " with the letter of the right option, '
    "or with a short answer where there are no options."
)


@dataclass(frozen=True)
class Mmmu(Task):
    """Questions with one or more pictures; each stands where the text mentions it."""

    title: ClassVar[str] = "MMMU"
    protocols: ClassVar[Mapping[str, Scorer]] = {
        "official": mmmu.official,
        "rule": choice.by_rule,
        "strict": choice.strict,
    }
    tables: ClassVar[tuple[tuple[str, ...], ...]] = (("discipline",), ("subject",))
    presets: ClassVar[Mapping[str, Sampling]] = {"instruct": INSTRUCT, "think": THINK}
    judged: ClassVar[str] = "rule"
    reads_truncated: ClassVar[frozenset[str]] = frozenset({"official", "rule"})

    dataset: str = option("MMMU_DEV_VAL", "name of the .tsv in the data folder")
    split: str = option("validation", "validation or dev; never both")
    use_cot: bool = option(False, "ask for a chain of thought")
    cot_prompt: str = option(COT, "what --use-cot asks for")
    min_pixels: int = option(0, "fewest pixels of a picture")
    max_pixels: int = option(0, "most pixels of a picture")

    def __post_init__(self) -> None:
        if self.cot_prompt != COT and not self.use_cot:
            raise ValueError("cot_prompt is given but use_cot is not; give both or neither")

    def open(self, data: Path) -> Dataset:
        splits: set[str] = set()

        def wanted(row: Row) -> bool:
            splits.add(split := row.need("split"))
            return split == self.split

        path = locate_tsv(data, self.dataset)
        table = Table(path, ("id", "index", "question", "A", "B", "answer", "split"), wanted)
        if not len(table):
            raise ValueError(
                f"{path}: no questions of the split {self.split!r}; give one of {', '.join(sorted(splits))}"
            )
        return dataset_of(table, lambda row: self._sample(table, row))

    def metrics(self, protocol: str, judged: Sequence[Judged]) -> list[Metric]:
        """As the official script prints it: the share of right answers of all, to 3 decimals.

        Its script guesses where it finds no option; with guessing is what that gives on average.
        """
        if protocol != "official" or not judged:
            return []
        right: defaultdict[str, list[bool]] = defaultdict(list)
        for one in judged:
            right[one.groups["discipline"]].append(one.verdict.right)
        total = sum(one.verdict.right for one in judged)
        guessed = sum(one.verdict.chance for one in judged if not one.verdict.right)
        return [
            Metric(
                "overall",
                round(total / len(judged), 3),
                "weighted by instances",
                {name: round(sum(each) / len(each), 3) for name, each in right.items()},
            ),
            Metric(
                "expected with guessing",
                round((total + guessed) / len(judged), 3),
                "what the official script's random choice adds on average",
            ),
        ]

    def _sample(self, table: Table, row: Row) -> Sample:
        id = row.need("id")
        target = _target(row)
        instruction = LETTER if target["options"] else SHORT
        text = question_text(
            row.need("question"),
            target["options"],
            self.cot_prompt if self.use_cot else instruction,
            row.text("hint"),
        )
        pictures = table.pictures(row)
        if mentioned(text) > len(pictures):
            raise row.error(
                "image",
                f"{len(pictures)} pictures, but <image {mentioned(text)}> is mentioned; fetch it again",
            )
        content = interleave(text, pictures, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        subject = _subject(row, id)
        return Sample(
            id=id,
            messages=[{"role": "user", "content": content}],
            target=target,
            cluster=id,
            groups={"subject": subject, "discipline": DISCIPLINE_OF[subject]},
        )


def _subject(row: Row, id: str) -> str:
    """Of ``validation_Art_Theory_12``, which the benchmark's authors gave: Art_Theory."""
    subject = id.partition("_")[2].rpartition("_")[0]
    if subject not in DISCIPLINE_OF:
        raise row.error("id", f"{id!r} names none of the 30 subjects, as in validation_Art_Theory_12")
    return subject


def _target(row: Row) -> dict[str, Any]:
    """An open question has no options; its answer is a text or a list of texts that are all right."""
    options = row.options()
    answer = row.need("answer")
    kind = row.text("question_type") or ("multiple-choice" if options else "open")
    if kind in ("open", "short-answer"):
        if options:
            raise row.error("A", "an open question with options; give the file as OpenCompass publishes it")
        return {"type": "open", "answer": text_list(answer) or answer, "options": {}}
    if kind != "multiple-choice":
        raise row.error("question_type", f"is {kind!r}; it must be multiple-choice or open")
    if answer not in options:
        raise row.error("answer", f"{answer!r} is none of the options {', '.join(options) or '(none)'}")
    return {"type": kind, "answer": answer, "options": options}
