"""RealWorldQA (xAI 2024): 765 questions about what can be seen from a car or in a street.

Read from RealWorldQA.tsv as OpenCompass publishes it. There is no official script.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from qwen_vl_serve import Sampling
from qwenvl_eval.data import Row, Table, dataset_of, fingerprint, interleave, locate_tsv, question_text
from qwenvl_eval.presets import INSTRUCT, THINK
from qwenvl_eval.scoring import Scorer, choice, realworldqa
from qwenvl_eval.task import Dataset, Sample, Task, option

LETTER = "Answer with the letter of the right option and nothing else."
SHORT = "Answer with a single word or number."


@dataclass(frozen=True)
class Realworldqa(Task):
    """Questions about one picture, with options or a one-word answer."""

    title: ClassVar[str] = "RealWorldQA"
    protocols: ClassVar[Mapping[str, Scorer]] = {
        "letter": realworldqa.letter,
        "rule": realworldqa.rule,
        "strict": choice.strict,
    }
    tables: ClassVar[tuple[tuple[str, ...], ...]] = (("type",),)
    presets: ClassVar[Mapping[str, Sampling]] = {"instruct": INSTRUCT, "think": THINK}
    judged: ClassVar[str] = "rule"
    reads_truncated: ClassVar[frozenset[str]] = frozenset({"letter", "rule"})

    dataset: str = option("RealWorldQA", "name of the .tsv in the data folder")
    min_pixels: int = option(0, "fewest pixels of a picture")
    max_pixels: int = option(0, "most pixels of a picture")

    def open(self, data: Path) -> Dataset:
        table = Table(locate_tsv(data, self.dataset), ("index", "question", "answer"))
        return dataset_of(table, lambda row: self._sample(table, row))

    def _sample(self, table: Table, row: Row) -> Sample:
        index = row.need("index")
        target = _target(row)
        instruction = LETTER if target["options"] else SHORT
        text = question_text(row.need("question"), target["options"], instruction, row.text("hint"))
        pictures = table.pictures(row)
        content = interleave(text, pictures, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        message = {"role": "user", "content": content}
        return Sample(index, [message], target, fingerprint(pictures), {"type": target["type"]})


def _target(row: Row) -> dict[str, Any]:
    """An answer that is the text of one option stands for its letter."""
    options = row.options()
    answer = row.need("answer")
    if not options:
        return {"type": "open", "answer": answer, "options": {}}
    named = [letter for letter, text in options.items() if text.lower() == answer.lower()]
    letter = answer if answer in options else named[0] if len(named) == 1 else ""
    if not letter:
        raise row.error("answer", f"{answer!r} is none of the options {', '.join(options)}")
    return {"type": "multiple-choice", "answer": letter, "options": options}
