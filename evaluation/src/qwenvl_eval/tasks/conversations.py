"""A file of one's own in the training conversation format: the last answer of each row is the one to be
given.

    row {"image": "a.png", "conversations": [{"from": "human", "value": "<image>What is this?"},
                                             {"from": "gpt", "value": "a cat"}]}
    -> messages [{"role": "user", "content": [image, "What is this?"]}], target {"answer": "a cat", ...}

``image`` and ``video`` hold one path or a list, relative to the data folder. Text around a placeholder
stays as it is. The rules are those of training. A row may have ``"id"`` and ``"group"`` (a text, for a
table).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

from qwenvl_eval.scoring import Outcome, Scorer
from qwenvl_eval.scoring.targets import METRICS, target_of
from qwenvl_eval.task import Dataset, Sample, Task, option

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile("<(image|video)>")


@dataclass(frozen=True)
class Conversations(Task):
    """Questions and answers of one's own."""

    title: ClassVar[str] = "Conversations"
    protocols: ClassVar[Mapping[str, Scorer]] = METRICS
    judged: ClassVar[str] = "exact"
    undecided: ClassVar[frozenset[Outcome]] = frozenset({Outcome.UNPARSED, Outcome.WRONG})
    tables: ClassVar[tuple[tuple[str, ...], ...]] = (("group",),)

    metric: str = option("exact", "exact, choice, anls, edit or iou")
    media_dir: str = option("", "folder of the media; default: the annotation file's")
    limit: int = option(0, "only the first N rows")
    min_pixels: int = option(0, "fewest pixels of a picture or frame")
    max_pixels: int = option(0, "most pixels of a picture or frame")

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}; there are {', '.join(METRICS)}")

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """The metric alone; a subclass with protocols of its own has those."""
        return {self.metric: METRICS[self.metric]} if self.protocols is METRICS else self.protocols

    def open(self, data: Path) -> Dataset:
        """``data``: a .json or .jsonl. Every row is read and its media are looked for.

        Raises ValueError, naming file, row, what was found and what to do, for the first row that can't be
        used.
        """
        size = sum(1 for _ in self._samples(data))
        if not size:
            raise ValueError(f"{data}: no rows; there is nothing to ask")
        return Dataset((data,), size, lambda: self._samples(data))

    def _samples(self, data: Path) -> Iterator[Sample]:
        folder = Path(self.media_dir) if self.media_dir else data.parent
        bounds = {name: getattr(self, name) for name in ("min_pixels", "max_pixels") if getattr(self, name)}
        for row, (where, record) in enumerate(islice(read_rows(data), self.limit or None)):
            try:
                yield _sample(row, record, folder, bounds, self.metric)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


def question_answer_pairs(annotations: Path) -> Iterator[tuple[str, str]]:
    """Every user turn's text (placeholders taken out) with the assistant turn after it."""
    for where, record in read_rows(annotations):
        try:
            turns = _turns(record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for (role, value), (next_role, answer) in pairwise(turns):
            if role == "user" and next_role == "assistant":
                yield _question(value), answer


def read_rows(annotations: Path) -> Iterator[tuple[str, Any]]:
    """Each row with how to name it; of a .jsonl one line at a time."""
    if annotations.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{annotations}: the name must end in .json (a list) or .jsonl (a row per line)")
    with annotations.open(encoding="utf-8", newline="\n") as file:
        if annotations.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{annotations}: line {number} (counted from 1)"
                    yield where, _parse(line, where)
            return
        rows = _parse(file.read(), str(annotations))
    if not isinstance(rows, list):
        raise ValueError(f"{annotations}: a JSON list of rows is expected, found {type(rows).__name__}")
    for number, record in enumerate(rows):
        yield f"{annotations}: row {number} (counted from 0)", record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}; correct or delete it") from error


def _sample(
    row: int,
    record: Any,
    folder: Path,
    bounds: Mapping[str, int],
    metric: str,
) -> Sample:
    turns = _turns(record)
    if turns[-1][0] != "assistant" or len(turns) < 2 or turns[-2][0] != "user":
        raise ValueError("the last two turns must be a question (human) and the answer to be given (gpt)")
    media = {kind: _paths(record, kind) for kind in ("image", "video")}
    waiting = {kind: [_locate(path, folder, kind) for path in paths] for kind, paths in media.items()}
    messages = [{"role": role, "content": _content(value, waiting, bounds)} for role, value in turns[:-1]]
    for kind, rest in waiting.items():
        if rest:
            raise ValueError(
                f'{len(rest)} of "{kind}" {media[kind]} have no <{kind}> in the text; add the tags'
            )
    question = _question(turns[-2][1])
    target = {**target_of(metric, question, turns[-1][1]), "question": question}
    group = record.get("group")
    return Sample(
        id=str(record.get("id", row)),
        messages=messages,
        target=target,
        cluster=" ".join((*media["image"], *media["video"])) or str(row),
        groups={"group": group} if isinstance(group, str) else {},
    )


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


def _locate(path: str, folder: Path, kind: str) -> str:
    if "://" in path or path.startswith("data:"):
        return path
    full = folder / path
    if not full.is_file():
        raise ValueError(f'"{kind}" {path}: no such file {full}; correct the row or --media-dir')
    return str(full)


def _content(
    value: str, waiting: dict[str, list[str]], bounds: Mapping[str, int]
) -> str | list[dict[str, Any]]:
    """Text and media in the order of the text; takes the media it uses from ``waiting``."""
    pieces = PLACEHOLDER.split(value)
    if len(pieces) == 1:
        return value
    content: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            content += [{"type": "text", "text": piece}] if piece else []
        elif not waiting[piece]:
            raise ValueError(f'more <{piece}> in the text than files under "{piece}"; add files or drop tags')
        else:
            content.append({"type": piece, piece: waiting[piece].pop(0), **bounds})
    return content


def _question(value: str) -> str:
    return PLACEHOLDER.sub("", value).strip()
