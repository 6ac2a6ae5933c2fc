"""Streaming: rows in an order without end, read as they come.

    FILE.jsonl, FILE.jsonl.gz -> JsonLines | FILE.parquet, a folder, hub: -> Indexed
      -> RowStream      rows in file order; with name%N, of each hundred rows N that the seed draws
      -> EndlessRows    windows of --streaming_buffer rows, taken from the streams by their weights and
                        shuffled, or without weights from one stream after another; then from the first again
      -> at(place)      RowAhead, parsed when asked for; encoded by StreamedDataset[place]

What stands at a place depends on the seed and the buffer alone. Processes, loader workers and resumed runs
ask for the places of their own batches and pass over the rows before them without parsing; each keeps one
window of unparsed rows.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwenvl.data.sources import Annotations, ParquetRows, check_pack, open_annotations, open_lines, parse_row

ORDERED_WINDOW = 1000


@dataclass(frozen=True)
class RowAhead:
    """The annotations of one row, its index 0, read from what is held in memory or mapped."""

    path: Path
    place: str
    read: Callable[[], object]
    packed: bool

    def __len__(self) -> int:
        return 1

    def where(self, index: int) -> str:
        """How messages name the row."""
        return self.place

    def row(self, index: int) -> object:
        """Parse the row. Raises ValueError, naming file and row, where it is broken or an unwanted pack."""
        row = self.read()
        check_pack(row, self.place, self.packed)
        return row


class Rows(Protocol):
    """Rows that are passed over in order (`scan`), and held for reading where they are wanted (`hold`)."""

    @property
    def path(self) -> Path: ...

    def scan(self) -> Iterator[Any]: ...

    def hold(self, pick: Any) -> tuple[str, Callable[[], object]]:
        """How messages name a row that `scan` gave, and the function that reads it."""
        ...


@dataclass(frozen=True)
class JsonLines:
    """The rows of a `.jsonl` or `.jsonl.gz` file; scan: number of the line, from 1, and its bytes."""

    path: Path

    def scan(self) -> Iterator[tuple[int, bytes]]:
        with open_lines(self.path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line

    def hold(self, pick: tuple[int, bytes]) -> tuple[str, Callable[[], object]]:
        number, line = pick
        where = f"{self.path}: line {number} (counted from 1)"
        return where, partial(parse_row, line, where)


@dataclass(frozen=True)
class Indexed:
    """The rows of a parquet file or an Arrow dataset; scan: the row's index."""

    path: Path
    annotations: Annotations

    def scan(self) -> Iterator[int]:
        return iter(range(len(self.annotations)))

    def hold(self, pick: int) -> tuple[str, Callable[[], object]]:
        rows = self.annotations
        # Shuffled rows would have their row group read again for each of them.
        read = rows.held(pick) if isinstance(rows, ParquetRows) else partial(rows.row, pick)
        return rows.where(pick), read


def open_rows(path: str, split: str | None) -> Rows:
    """Open what `open_annotations` opens, but for a JSON list; nothing is read but a first row."""
    if path.endswith(".json"):
        raise ValueError(
            f"annotation file {path}: --streaming reads no JSON list; write a row per line (.jsonl)"
        )
    if path.endswith((".jsonl", ".jsonl.gz")):
        lines = JsonLines(Path(path))
        if next(lines.scan(), None) is None:
            raise ValueError(f"annotation file {path} has no rows")
        return lines
    annotations = open_annotations(path, split)
    return Indexed(annotations.path, annotations)


@dataclass(frozen=True)
class RowStream:
    """A data set in use: its rows, the share of them (1.0: each once), the folder of its media."""

    name: str
    rows: Rows
    data_path: str
    rate: float
    packed: bool

    def once(self, seed: int) -> Iterator[tuple[RowStream, Any]]:
        """One pass, in file order; of a rate above 1 the copies of a row follow each other.

        Raises ValueError where no row is drawn.
        """
        whole, part = divmod(round(self.rate * 100), 100)
        drawn: set[int] = set()
        found = False
        for number, pick in enumerate(self.rows.scan()):
            place = number % 100
            if part and not place:
                chance = random.Random(f"{seed}/{self.name}/{number}")
                drawn = set(chance.sample(range(100), part))
            if copies := whole + (place in drawn):
                found = True
                yield from repeat((self, pick), copies)
        if not found:
            percent = 100 * whole + part
            raise ValueError(f"data set {self.name}%{percent} takes none of its rows; raise the share")

    def hold(self, pick: Any) -> RowAhead:
        """A row that `once` gave, ready to be read."""
        place, read = self.rows.hold(pick)
        return RowAhead(self.rows.path, place, read, self.packed)


def _endless(streams: list[RowStream], seed: int) -> Iterator[tuple[RowStream, Any]]:
    while True:
        for stream in streams:
            yield from stream.once(seed)


@dataclass
class _Reader:
    """One process's way forward: each track's rows, the next window's number, the rows of the one before."""

    process: int
    tracks: list[Iterator[tuple[RowStream, Any]]]
    next: int = 0
    rows: list[tuple[RowStream, RowAhead]] = field(default_factory=list)


class EndlessRows:
    """Rows of all streams by their place in the order.

    weights: of each stream, or None to read one after another; buffer: rows of a window, within which they
    are shuffled; 1: the order of the files.
    """

    def __init__(self, streams: list[RowStream], weights: list[float] | None, *, buffer: int, seed: int):
        self.streams = streams
        self.window = buffer if buffer > 1 else ORDERED_WINDOW
        self._shuffled = buffer > 1
        self._tracks = [streams] if weights is None else [[stream] for stream in streams]
        self._shares = np.array(weights or [1.0]) / sum(weights or [1.0])
        self._seed = seed
        self._reader: _Reader | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_reader": None}

    def at(self, place: int) -> tuple[RowStream, RowAhead]:
        """The row at a place from 0 on. Going forward is cheap; going back reads anew from the beginning."""
        number, within = divmod(place, self.window)
        return self._rows(number)[within]

    def stand_in(self, place: int, step: int) -> int:
        """The place, so many steps on in the same window, whose row stands in for a bad one."""
        number, within = divmod(place, self.window)
        return number * self.window + (within + step) % self.window

    def _rows(self, number: int) -> list[tuple[RowStream, RowAhead]]:
        reader = self._reader
        # A forked worker has the open files of the process it comes from, and must not move in them.
        if reader is None or reader.process != os.getpid() or number < reader.next - 1:
            tracks = [_endless(track, self._seed) for track in self._tracks]
            reader = self._reader = _Reader(os.getpid(), tracks)
        if number >= reader.next:
            self._pass_over(reader, number)
            drawn, order = self._draw(number)
            rows = [next(reader.tracks[track]) for track in drawn]
            reader.rows = [(stream, stream.hold(pick)) for stream, pick in rows]
            reader.rows = [reader.rows[index] for index in order]
            reader.next = number + 1
        return reader.rows

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a window: the track that each row is taken from, and the order they come to stand in."""
        chance = np.random.default_rng([self._seed, number])
        drawn = chance.choice(len(self._shares), self.window, p=self._shares)
        return drawn, chance.permutation(self.window) if self._shuffled else np.arange(self.window)

    def _pass_over(self, reader: _Reader, number: int) -> None:
        counts = np.zeros(len(self._tracks), np.int64)
        for passed in range(reader.next, number):
            counts += np.bincount(self._draw(passed)[0], minlength=len(counts))
        for track, count in zip(reader.tracks, counts.tolist(), strict=True):
            deque(islice(track, count), maxlen=0)
