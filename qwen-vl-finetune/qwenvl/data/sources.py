"""Annotation files: rows kept as bytes and parsed when asked for, and the check of a whole file.

    FILE.jsonl (a row per line) | FILE.json (a list of rows)
      -> open_annotations -> Annotations: blob [bytes], spans [n, 2], lines [n] (JSONL)
      -> check_annotations -> BadRow(row, reason) ...
      -> sample_rows -> indices of the rows in use

Bytes and two arrays, not a list of dicts: forked loader workers share them without copying, and a million
rows cost what the file costs.
"""

from __future__ import annotations

import json
import os
import random
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from qwenvl.data.messages import is_url, read_sample

_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, eq=False)
class Annotations:
    """The rows of one annotation file.

    `spans` int64 [n, 2]: start and end of each row's JSON in `blob`. `lines` int64 [n]: its line, from 1;
    None for a JSON list, whose rows are named by index, from 0.
    """

    path: Path
    blob: bytes
    spans: np.ndarray
    lines: np.ndarray | None

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, index: int) -> str:
        """How messages name a row."""
        if self.lines is None:
            return f"{self.path}: row {index} (counted from 0)"
        return f"{self.path}: line {self.lines[index]} (counted from 1)"

    def row(self, index: int) -> object:
        """Parse one row. Raises ValueError, naming file and row, where it is not JSON."""
        start, end = self.spans[index]
        try:
            return json.loads(self.blob[start:end])
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: {_broken(error)}") from None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on, and why."""

    row: int
    reason: str


def samples_of(row: object) -> list:
    """The samples of a row: itself, or the members of a packed list."""
    return row if isinstance(row, list) else [row]


def sample_where(where: str, row: object, member: int) -> str:
    """How messages name a sample: its row, and its place in it where the row is a packed list."""
    return f"{where}, sample {member} of the pack" if isinstance(row, list) else where


def _broken(error: ValueError) -> str:
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return f"not valid JSON: {reason}; correct or delete the row"


def open_annotations(path: str | Path) -> Annotations:
    """Find the rows of a `.json` or `.jsonl` file.

    Raises ValueError, naming the file and, for a JSON list, the row that is broken; a JSONL row is parsed,
    and complained about, when it is asked for.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"annotation file {path}: the name must end in .json (a list) or .jsonl (row per line)"
        )
    try:
        blob = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"annotation file {path}: {error.strerror}; correct annotation_path") from error
    found = _line_spans(path, blob) if path.suffix == ".jsonl" else _list_spans(path, blob)
    if not len(found):
        raise ValueError(f"annotation file {path} has no rows")
    return found


def _line_spans(path: Path, blob: bytes) -> Annotations:
    spans, lines, start = [], [], 0
    for number, line in enumerate(blob.split(b"\n"), 1):
        if line.strip():
            spans.append((start, start + len(line)))
            lines.append(number)
        start += len(line) + 1
    return Annotations(path, blob, np.array(spans, np.int64).reshape(-1, 2), np.array(lines, np.int64))


def _list_spans(path: Path, blob: bytes) -> Annotations:
    try:
        text = blob.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"annotation file {path}: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
    rows: list[bytes] = []
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"annotation file {path}: not a JSON list; name a file with one row per line .jsonl")
    at = _skip(text, at + 1)
    closed = text[at : at + 1] == "]"
    at += closed
    while not closed:
        where = f"{path}: row {len(rows)} (counted from 0)"
        try:
            _, end = decode(text, at)
        except json.JSONDecodeError as error:
            place = f"{error.msg} at line {error.lineno}, column {error.colno}"
            raise ValueError(f"{where}: not valid JSON: {place}; correct or delete the row") from None
        rows.append(text[at:end].encode("utf-8"))
        at = _skip(text, end)
        if text[at : at + 1] not in (",", "]"):
            raise ValueError(f"{where}: not valid JSON: no comma or ] after the row; the file may be cut off")
        closed = text[at] == "]"
        at = _skip(text, at + 1)
    if text[at:].strip():
        raise ValueError(f"annotation file {path}: text after the closing ] of the list; delete it")
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    starts = ends - np.array([len(row) for row in rows], np.int64)
    return Annotations(path, b"".join(rows), np.stack([starts, ends], axis=1), None)


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    assert blank is not None
    return blank.end()


def check_annotations(
    annotations: Annotations, data_path: str, *, refused: re.Pattern[str], packed: bool
) -> list[BadRow]:
    """Read every row as training will and look whether its media files are there (each distinct file once).

    refused: what no text may contain (`messages.refused_text`). packed: whether rows may be lists of samples.
    """
    reason_not_there = cache(_missing)
    bad = []
    for index in range(len(annotations)):
        try:
            row = annotations.row(index)
            _check_row(row, annotations.where(index), data_path, refused, packed, reason_not_there)
        except ValueError as error:
            bad.append(BadRow(index, str(error)))
    return bad


def _check_row(
    row: object,
    where: str,
    data_path: str,
    refused: re.Pattern[str],
    packed: bool,
    reason_not_there: Callable[[str], str | None],
) -> None:
    if isinstance(row, list) and not packed:
        raise ValueError(
            f"{where}: a packed list of samples; pass --data_packing True or --data_flatten True"
        )
    if isinstance(row, list) and not row:
        raise ValueError(f"{where}: an empty list; delete the row")
    for member, fields in enumerate(samples_of(row)):
        try:
            sample = read_sample(fields, data_path, refused)
            for path in sample.images + sample.videos:
                if reason := reason_not_there(path):
                    raise ValueError(reason)
        except ValueError as error:
            raise ValueError(f"{sample_where(where, row, member)}: {error}") from None


def _missing(path: str) -> str | None:
    if is_url(path):
        return None
    try:
        found = os.stat(path)
    except OSError as error:
        return f"media file {path}: {error.strerror}; correct the row or data_path"
    if not stat.S_ISREG(found.st_mode):
        return f"media file {path} is not a file; name a picture or a video file"
    return None if found.st_size else f"media file {path} is empty; replace it or delete the row"


def sample_rows(rows: np.ndarray, rate: float, *, seed: int, name: str) -> np.ndarray:
    """Take a share of `rows` (int64 [n]), in file order; above 1.0 whole repetitions come first.

    The draw depends on `seed` and the data set's name alone: every rank and every resumed run takes the same.
    """
    percent = round(rate * 100)
    whole, part = divmod(percent, 100)
    chosen = [rows] * whole
    if part:
        draw = random.Random(f"{seed}/{name}").sample(range(len(rows)), len(rows) * part // 100)
        chosen.append(rows[np.sort(np.array(draw, np.int64))])
    taken = np.concatenate(chosen)
    if not len(taken):
        raise ValueError(f"data set {name}%{percent} takes none of its {len(rows)} rows; raise the share")
    return taken
