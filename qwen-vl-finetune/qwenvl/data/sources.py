"""Annotation files: rows parsed when asked for, and the check of a whole file.

    FILE.jsonl, FILE.jsonl.gz (a row per line) | FILE.json (a list of rows)
      -> open_annotations -> JsonRows: blob [bytes], spans [n, 2], lines [n] (JSONL)
    FILE.parquet (a row per row; pictures may be inside, as {"bytes", "path"})
      -> open_annotations -> ParquetRows: starts [row groups + 1]; a row group is read when needed
    a folder or hub: id of Hugging Face's datasets
      -> open_annotations -> hub.ArrowRows: memory-mapped
    any, of rows with two answers
      -> Pairs: each row as a packed list, the chosen answer's sample and the rejected one's
    any
      -> check_annotations -> BadRow(row, reason) ...
      -> sample_rows -> indices of the rows in use

Of JSON, bytes and two arrays, not a list of dicts: forked loader workers share them without copying, and a
million rows cost what the file costs. Of parquet, nothing but the borders of row groups. Streaming takes the
rows of JSONL from `lines` instead.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwenvl.data import HUB_PREFIX
from qwenvl.data.hub import open_dataset, table_row
from qwenvl.data.messages import PAIR, Pair, is_url, read_sample, split_pair

_BLANK = re.compile(r"[ \t\r\n]*")
KEPT_ROW_GROUPS = 4


class Annotations(Protocol):
    """The rows of one annotation file."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """How messages name a row."""
        ...

    def row(self, index: int) -> object:
        """Read one row. Raises ValueError, naming file and row, where it cannot be read."""
        ...


@dataclass(frozen=True, eq=False)
class JsonRows:
    """The rows of a JSON or JSONL file.

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
        return parse_row(self.blob[start:end], self.where(index))


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """The rows of a parquet file.

    `starts` int64 [row groups + 1]: the first row of each group, and the number of rows. `kept`: groups that
    stay in memory, the last ones read.
    """

    path: Path
    starts: np.ndarray
    kept: int = KEPT_ROW_GROUPS

    def __len__(self) -> int:
        return int(self.starts[-1])

    def where(self, index: int) -> str:
        return f"{self.path}: row {index} (counted from 0)"

    def row(self, index: int) -> object:
        """Read one row, with its group. Raises ValueError, naming file and row, where that fails."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        try:
            table = _row_groups(self.kept)(self.path, group)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.where(index)}: {error}; write the file anew") from error
        return table_row(table.slice(int(index - self.starts[group]), 1))


@cache
def _row_groups(kept: int) -> Callable[[Path, int], pa.Table]:
    """The function that reads a row group, and keeps the last ones of all files."""

    @lru_cache(maxsize=kept)
    def read(path: Path, group: int) -> pa.Table:
        # No threads: loader workers are forked, and each reads for itself.
        with pq.ParquetFile(path, memory_map=True) as file:
            return file.read_row_group(group, use_threads=False)

    return read


def _parquet_rows(path: Path) -> ParquetRows:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            groups = file.metadata
            counts = [groups.row_group(index).num_rows for index in range(groups.num_row_groups)]
    except FileNotFoundError:
        raise ValueError(
            f"annotation file {path}: No such file or directory; correct annotation_path"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"annotation file {path}: not a parquet file: {error}; write it anew") from error
    return ParquetRows(path, np.cumsum([0, *counts], dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Pairs:
    """The rows of another, each with two answers, as `Pair`s."""

    rows: Annotations

    @property
    def path(self) -> Path:
        return self.rows.path

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return self.rows.where(index)

    def row(self, index: int) -> Pair:
        row = self.rows.row(index)
        try:
            return split_pair(row)
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: {error}") from error


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
    if isinstance(row, Pair):
        return f"{where}, {PAIR[member]!r}"
    return f"{where}, sample {member} of the pack" if isinstance(row, list) else where


def parse_row(line: bytes, where: str) -> object:
    """A row's JSON. Raises ValueError, naming file and row, where it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{where}: not valid JSON: {reason}; correct or delete the row")


def open_annotations(path: str | Path, split: str | None = None) -> Annotations:
    """Find the rows of a `.json`, `.jsonl`, `.jsonl.gz` or `.parquet` file, or of a dataset of Hugging Face:
    a folder or a `hub:` id, of which `split` names a part.

    Raises ValueError, naming the file and, for a JSON list, the row that is broken; a JSONL row is parsed,
    and complained about, when it is asked for.
    """
    name, path = str(path), Path(path)
    if name.startswith(HUB_PREFIX) or path.is_dir():
        found = open_dataset(name, split)
    elif split is not None:
        raise ValueError(f"annotation file {path}: split = {split!r}: only a folder or hub: id has splits")
    elif path.suffix == ".parquet":
        found = _parquet_rows(path)
    elif name.endswith((".json", ".jsonl", ".jsonl.gz")):
        found = _json_rows(path)
    else:
        raise ValueError(
            f"annotation file {path}: the name must end in .json (a list), .jsonl (row per line), .jsonl.gz "
            "or .parquet, or be that of a folder"
        )
    if not len(found):
        raise ValueError(f"annotation file {path} has no rows")
    return found


def _json_rows(path: Path) -> JsonRows:
    with open_lines(path) as file:
        blob = file.read().removeprefix(b"\xef\xbb\xbf")
    return _list_spans(path, blob) if path.suffix == ".json" else _line_spans(path, blob)


@contextmanager
def open_lines(path: Path) -> Iterator[BinaryIO]:
    """A file to read, unpacked where it is `.gz`. Raises ValueError naming it where that fails."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"annotation file {path}: {reason}; correct annotation_path") from error


def _line_spans(path: Path, blob: bytes) -> JsonRows:
    spans, lines, start = [], [], 0
    for number, line in enumerate(blob.split(b"\n"), 1):
        if line.strip():
            spans.append((start, start + len(line)))
            lines.append(number)
        start += len(line) + 1
    return JsonRows(path, blob, np.array(spans, np.int64).reshape(-1, 2), np.array(lines, np.int64))


def _list_spans(path: Path, blob: bytes) -> JsonRows:
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
    return JsonRows(path, b"".join(rows), np.stack([starts, ends], axis=1), None)


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
    check_pack(row, where, packed)
    for member, fields in enumerate(samples_of(row)):
        try:
            sample = read_sample(fields, data_path, refused)
            for path in sample.files():
                if reason := reason_not_there(path):
                    raise ValueError(reason)
        except ValueError as error:
            raise ValueError(f"{sample_where(where, row, member)}: {error}") from None


def check_pack(row: object, where: str, packed: bool) -> None:
    """Raises ValueError for a row that is a packed list where it must not be one, and for an empty list."""
    if isinstance(row, list) and not packed:
        raise ValueError(
            f"{where}: a packed list of samples; pass --data_packing True, or leave out --data_flatten False"
        )
    if isinstance(row, list) and not row:
        raise ValueError(f"{where}: an empty list; delete the row")


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
    count = len(rows) * whole + len(rows) * part // 100
    if not count:
        raise ValueError(f"data set {name}%{percent} takes none of its {len(rows)} rows; raise the share")
    return _take(rows, count, seed=seed, name=name)


def _take(rows: np.ndarray, count: int, *, seed: int, name: str) -> np.ndarray:
    """`count` of `rows`: whole repetitions, then a draw without repetition, in file order."""
    whole, part = divmod(count, len(rows))
    draw = random.Random(f"{seed}/{name}").sample(range(len(rows)), part)
    return np.concatenate([*[rows] * whole, rows[np.sort(np.array(draw, np.int64))]])


def mix_rows(
    sets: list[np.ndarray], weights: list[float], *, seed: int, names: list[str]
) -> list[np.ndarray]:
    """As many rows as `sets` have together, in shares that follow `weights`; a set with too few is repeated.

    Shares are exact to a row (largest remainders first). The draw is that of `sample_rows`, so every rank and
    every resumed run takes the same, and each epoch has the same rows.
    """
    total = sum(map(len, sets))
    exact = [total * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(sets)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    if not all(counts):
        name = names[counts.index(0)]
        raise ValueError(f"data set {name!r} gets none of {total} rows by its weight; raise the weight")
    return [
        _take(rows, count, seed=seed, name=name)
        for rows, count, name in zip(sets, counts, names, strict=True)
    ]
