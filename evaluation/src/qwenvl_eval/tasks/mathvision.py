"""MATH-Vision (Wang et al. 2024, arXiv 2402.14804): competition mathematics about a picture.

Read from MathVision.tsv (3,040 questions) or MathVision_MINI.tsv (304) as OpenCompass publishes them:
``category`` is the subject, ``choices`` a list of the options' texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

from qwen_vl_serve import Sampling
from qwenvl_eval.data import (
    Row,
    Table,
    dataset_of,
    fingerprint,
    interleave,
    locate_tsv,
    question_text,
    text_list,
)
from qwenvl_eval.presets import INSTRUCT, THINK
from qwenvl_eval.scoring import Scorer, mathvision
from qwenvl_eval.task import Dataset, Sample, Task, option

BOXED = r"Write the final answer in \boxed{}; where there are options, only the letter of the right one."
COT = f"Reason step by step. {BOXED}"


@dataclass(frozen=True)
class Mathvision(Task):
    """Questions with a value or one of five options for an answer."""

    title: ClassVar[str] = "MathVision"
    protocols: ClassVar[Mapping[str, Scorer]] = {"official": mathvision.official, "strict": mathvision.strict}
    tables: ClassVar[tuple[tuple[str, ...], ...]] = (("subject",), ("level",))
    presets: ClassVar[Mapping[str, Sampling]] = {"instruct": INSTRUCT, "think": THINK}
    judged: ClassVar[str] = "strict"
    reads_truncated: ClassVar[frozenset[str]] = frozenset({"official"})

    dataset: str = option("MathVision", "name of the .tsv in the data folder, such as MathVision_MINI")
    num_samples: int = option(0, "only the first N questions")
    use_cot: bool = option(False, "ask for a chain of thought")
    cot_prompt: str = option(COT, "what --use-cot asks for")
    min_pixels: int = option(0, "fewest pixels of a picture")
    max_pixels: int = option(0, "most pixels of a picture")

    def __post_init__(self) -> None:
        if self.cot_prompt != COT and not self.use_cot:
            raise ValueError("cot_prompt is given but use_cot is not; give both or neither")
        if self.num_samples < 0:
            raise ValueError(f"num_samples is {self.num_samples}; give a number from 1 up, or 0 for all")

    def open(self, data: Path) -> Dataset:
        table = Table(locate_tsv(data, self.dataset), ("index", "question", "answer", "category"))
        return dataset_of(table, lambda row: self._sample(table, row), self.num_samples)

    def _sample(self, table: Table, row: Row) -> Sample:
        index = row.need("index")
        question = row.need("question")
        target = _target(row)
        options = dict(zip(ascii_uppercase, target["options"], strict=False))
        shown = {} if _shows_options(question, options) else options
        text = question_text(question, shown, self.cot_prompt if self.use_cot else BOXED)
        pictures = table.pictures(row)
        content = interleave(text, pictures, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        groups = {"subject": row.need("category")}
        if target["level"] is not None:
            groups["level"] = str(target["level"])
        message = {"role": "user", "content": content}
        return Sample(index, [message], target, fingerprint(pictures), groups)


def _shows_options(question: str, options: Mapping[str, str]) -> bool:
    """Whether the question's text already lists them, as ``(A) one (B) two``."""
    return all(f"({letter})" in question and text in question for letter, text in options.items())


def _target(row: Row) -> dict[str, Any]:
    """``options`` are texts in the order of their letters; ``level`` is None where the file has none.

    "open" is for a judge model, which compares with the gold answer, be it an option's letter or its text.
    """
    choices = row.text("choices")
    options = list(row.options().values()) if not choices else text_list(choices)
    if options is None:
        raise row.error("choices", f"no list of texts: {choices[:40]!r}; fetch the file again")
    answer = row.need("answer")
    if not options:
        answer = row.cells["answer"]  # the official comparison sees the published spaces too
    elif answer not in list(ascii_uppercase[: len(options)]):
        raise row.error("answer", f"{answer!r} is the letter of none of the {len(options)} options")
    level = row.text("level")
    if level and level not in list("12345"):
        raise row.error("level", f"is {level!r}; it must be 1 to 5")
    return {"type": "open", "answer": answer, "options": options, "level": int(level) if level else None}
