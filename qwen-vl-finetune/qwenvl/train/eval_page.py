"""The answers of an evaluation as files: one line of JSON an answer, and a page with the pictures.

Answer ... -> write_samples -> FOLDER/step-N.jsonl
                            -> FOLDER/step-N.html, one file, thumbnails inside, no script
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qwenvl.data.thumbnails import thumbnail
from qwenvl_eval.scoring import Outcome

PAGE_PICTURES = 200
"""Pictures on a page; answers after them are shown without."""


@dataclass(frozen=True)
class Judged:
    """What a metric says of an answer; score from 0 to 1."""

    outcome: Outcome
    score: float


@dataclass(frozen=True)
class Answer:
    """A question of an evaluation set, the answer that was wanted, and the model's.

    row: the annotation file's row. prompt: messages up to the answer, media with their paths. truncated: the
    model had not ended at --eval_max_new_tokens. verdicts: metric -> what it says.
    """

    dataset: str
    row: str
    prompt: list[dict[str, Any]]
    reference: str
    output: str
    truncated: bool
    verdicts: dict[str, Judged]


def write_samples(folder: Path, step: int, answers: Sequence[Answer]) -> None:
    """Write both files; each is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(answer), ensure_ascii=False, default=_bytes) for answer in answers)
    _replace(folder / f"step-{step}.jsonl", "".join(f"{line}\n" for line in lines))
    _replace(folder / f"step-{step}.html", render(step, answers))


def render(step: int, answers: Sequence[Answer]) -> str:
    """The page; everything that a model or a data set wrote is escaped."""
    left = PAGE_PICTURES
    cards = []
    for answer in answers:
        items = [item for message in answer.prompt for item in _items(message) if item["type"] != "text"]
        pictures = [thumbnail(item) for item in items[:left]]
        left -= len(pictures)
        turns = [(message["role"], _text(message)) for message in answer.prompt]
        cards.append((answer, turns, pictures))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = Path(__file__).with_name("eval_page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(step=step, cards=cards)


def _items(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _text(message: Mapping[str, Any]) -> str:
    """A turn as text, a mark in place of each medium."""
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(item.get("text", f"<{item['type']}>") for item in message["content"])


def _bytes(value: object) -> str:
    """How a picture that lies inside a table is written down."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes in the data set"
    raise TypeError(f"{type(value).__name__} in a prompt has no JSON form")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
