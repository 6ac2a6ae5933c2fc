"""Questions from an annotation file in the training conversation format.

    row {"image": "a.png", "conversations": [{"from": "human", "value": "<image>What is this?"},
                                             {"from": "gpt", "value": "a cat"}]}
    -> Sample(messages=[{"role": "user", "content": [image, "What is this?"]}], target="a cat")

The last assistant turn of a row is the answer to be given; the turns before it are the prompt. ``image`` and
``video`` hold one path or a list, relative to the data folder. Text around a placeholder stays as it is. The
rules are those of training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile("<(image|video)>")


@dataclass(frozen=True)
class Sample:
    """One question; ``row`` counts from 0, ``question`` is the last user turn's text, ``media`` the paths."""

    row: int
    messages: list[dict[str, Any]]
    question: str
    target: str
    media: tuple[str, ...]


def load_samples(annotations: Path, data_path: Path, *, limit: int | None = None) -> list[Sample]:
    """Read the first ``limit`` rows (all without it) and check that their media exist.

    Raises ValueError, naming file, row, what was found and what to do, for the first row that cannot be used.
    """
    samples = []
    for row, (where, record) in enumerate(islice(_records(annotations), limit)):
        try:
            samples.append(_sample(row, record, data_path))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not samples:
        raise ValueError(f"{annotations}: no rows; there is nothing to ask")
    return samples


def question_answer_pairs(annotations: Path) -> Iterator[tuple[str, str]]:
    """Every user turn's text (placeholders taken out) with the assistant turn after it."""
    for where, record in _records(annotations):
        try:
            turns = _turns(record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for (role, value), (next_role, answer) in pairwise(turns):
            if role == "user" and next_role == "assistant":
                yield _question(value), answer


def _records(annotations: Path) -> Iterator[tuple[str, Any]]:
    """Each row with how to name it."""
    if annotations.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{annotations}: the name must end in .json (a list) or .jsonl (a row per line)")
    text = annotations.read_text(encoding="utf-8")
    if annotations.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{annotations}: line {number} (counted from 1)"
                yield where, _parse(line, where)
        return
    rows = _parse(text, str(annotations))
    if not isinstance(rows, list):
        raise ValueError(f"{annotations}: a JSON list of rows is expected, found {type(rows).__name__}")
    for number, record in enumerate(rows):
        yield f"{annotations}: row {number} (counted from 0)", record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}; correct or delete it") from error


def _sample(row: int, record: Any, data_path: Path) -> Sample:
    turns = _turns(record)
    if turns[-1][0] != "assistant" or len(turns) < 2 or turns[-2][0] != "user":
        raise ValueError("the last two turns must be a question (human) and the answer to be given (gpt)")
    media = {kind: _paths(record, kind) for kind in ("image", "video")}
    waiting = {kind: [_locate(path, data_path, kind) for path in paths] for kind, paths in media.items()}
    messages = [{"role": role, "content": _content(value, waiting)} for role, value in turns[:-1]]
    for kind, rest in waiting.items():
        if rest:
            raise ValueError(
                f'{len(rest)} of "{kind}" {media[kind]} have no <{kind}> in the text; add the tags'
            )
    return Sample(row, messages, _question(turns[-2][1]), turns[-1][1], (*media["image"], *media["video"]))


def _turns(record: Any) -> list[tuple[str, str]]:
    conversations = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(conversations, list) or not conversations:
        raise ValueError('"conversations" must be a list of turns')
    turns = []
    for number, turn in enumerate(conversations):
        known = isinstance(turn, dict)
        who, text = ("from", "value") if known and "from" in turn else ("role", "content")
        role, value = (turn.get(who), turn.get(text)) if known else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(value, str):
            roles = ", ".join(ROLES)
            raise ValueError(
                f'turn {number} needs "from" (one of {roles}) and "value" (a text): found {turn!r}'
            )
        if ROLES[role] != "user" and PLACEHOLDER.search(value):
            raise ValueError(f"turn {number} ({role}) contains <image> or <video>; only user turns may")
        turns.append((ROLES[role], value))
    return turns


def _paths(record: dict[str, Any], kind: str) -> list[str]:
    found = [record[name] for name in (kind, f"{kind}s") if record.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f'both "{kind}" and "{kind}s"; keep one of them')
    paths = found if not found or isinstance(found[0], str) else found[0]
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f'"{kind}" must be a path or a list of paths: found {paths!r}')
    return paths


def _locate(path: str, data_path: Path, kind: str) -> str:
    if "://" in path or path.startswith("data:"):
        return path
    full = data_path / path
    if not full.is_file():
        raise ValueError(f'"{kind}" {path}: no such file {full}; correct the row or --data-path')
    return str(full)


def _content(value: str, waiting: dict[str, list[str]]) -> str | list[dict[str, str]]:
    """Text and media in the order of the text; takes the media it uses from ``waiting``."""
    pieces = PLACEHOLDER.split(value)
    if len(pieces) == 1:
        return value
    content: list[dict[str, str]] = []
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            content += [{"type": "text", "text": piece}] if piece else []
        elif not waiting[piece]:
            raise ValueError(f'more <{piece}> in the text than files under "{piece}"; add files or drop tags')
        else:
            content.append({"type": piece, piece: waiting[piece].pop(0)})
    return content


def _question(value: str) -> str:
    return PLACEHOLDER.sub("", value).strip()
