"""Streaming: rows in an order without end, each found by its place in it.

    FILE.jsonl, FILE.jsonl.gz -> lines.find_rows | FILE.parquet, a folder, hub: -> open_annotations
      -> RowStream      rows in file order; with name%N, of each hundred rows N that the seed draws
      -> EndlessRows    taken from the streams by their weights, or without weights from one stream after
                        another, then from the first again; shuffled in windows of --streaming_buffer rows
      -> at(place)      the stream and its row, read when asked for; encoded by StreamedDataset[place]

What stands at a place depends on the seed and the buffer alone, and is worked out without going over the
places before it. So processes, loader workers and resumed runs read the rows of their own batches and no
others; what a process holds is the order of one window.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from qwenvl.data.lines import find_rows
from qwenvl.data.sources import Annotations, ParquetRows, check_pack, open_annotations


def open_rows(path: str, split: str | None, *, window: int) -> Annotations:
    """Open what `open_annotations` opens, but for a JSON list, without reading it whole.

    window: so many rows in a row are asked for in any order.
    """
    if path.endswith(".json"):
        raise ValueError(
            f"annotation file {path}: --streaming reads no JSON list; write a row per line (.jsonl)"
        )
    if path.endswith((".jsonl", ".jsonl.gz")):
        return find_rows(Path(path))
    rows = open_annotations(path, split)
    if isinstance(rows, ParquetRows):
        # Fewer, and shuffled rows would have their row group read again for each of them.
        groups = window * (len(rows.starts) - 1) // len(rows) + 2
        return replace(rows, kept=max(rows.kept, groups))
    return rows


@dataclass(frozen=True, eq=False)
class RowStream:
    """A data set in use: its rows, the share of them (1.0: each once) that `seed` draws, the folder of its
    media, whether rows may be packed lists.
    """

    name: str
    rows: Annotations
    data_path: str
    rate: float
    packed: bool
    seed: int

    @property
    def path(self) -> Path:
        return self.rows.path

    def __len__(self) -> int:
        """Rows of one pass, each copy counted."""
        hundreds, rest = divmod(len(self.rows), 100)
        return hundreds * self._percent + bisect_right(self._hundred(hundreds), rest - 1)

    def pick(self, place: int) -> int:
        """The row at a place of one pass, in file order; copies of a row follow each other."""
        hundred, within = divmod(place, self._percent)
        return 100 * hundred + self._hundred(hundred)[within]

    def where(self, index: int) -> str:
        """How messages name a row."""
        return self.rows.where(index)

    def row(self, index: int) -> object:
        """Read a row. Raises ValueError, naming file and row, where it is broken or an unwanted pack."""
        row = self.rows.row(index)
        check_pack(row, self.where(index), self.packed)
        return row

    @property
    def _percent(self) -> int:
        return round(self.rate * 100)

    def _hundred(self, number: int) -> list[int]:
        return _draw(f"{self.seed}/{self.name}/{100 * number}", self._percent)


@lru_cache(maxsize=1024)
def _draw(seed: str, percent: int) -> list[int]:
    """So many of each hundred rows, 0 to 99, ascending; above 100 whole repetitions come first."""
    whole, part = divmod(percent, 100)
    return sorted([*range(100)] * whole + random.Random(seed).sample(range(100), part))


class EndlessRows:
    """Rows of all streams by their place in the order.

    weights: of each stream, or None to read one after another; buffer: rows of a window, within which they
    are shuffled; 1: the order of the files.  Raises ValueError for a stream of which no row is drawn.
    """

    def __init__(self, streams: list[RowStream], weights: list[float] | None, *, buffer: int, seed: int):
        for stream in streams:
            if not len(stream):
                percent = round(stream.rate * 100)
                raise ValueError(f"data set {stream.name}%{percent} takes none of its rows; raise the share")
        self.streams = streams
        self._tracks = [streams] if weights is None else [[stream] for stream in streams]
        self._ends = [list(accumulate(map(len, track))) for track in self._tracks]
        exact = [Fraction(weight) for weight in weights or [1]]
        # Of what the tracks before leave over, the share that is each track's.
        self._shares = [weight / sum(exact[index:]) for index, weight in enumerate(exact)]
        self._buffer = buffer
        self._seed = seed
        self._window: tuple[int, np.ndarray] = (-1, np.arange(0))

    def at(self, place: int) -> tuple[RowStream, int]:
        """The stream and its row at a place from 0 on."""
        if self._buffer > 1:
            number, within = divmod(place, self._buffer)
            place = number * self._buffer + int(self._order(number)[within])
        track, place = self._track(place)
        ends = self._ends[track]
        place %= ends[-1]
        index = bisect_right(ends, place)
        stream = self._tracks[track][index]
        return stream, stream.pick(place - ends[index] + len(stream))

    def _order(self, number: int) -> np.ndarray:
        """The order in which the rows of a window stand, int64 [buffer]."""
        if self._window[0] != number:
            self._window = number, np.random.default_rng([self._seed, number]).permutation(self._buffer)
        return self._window[1]

    def _track(self, place: int) -> tuple[int, int]:
        """The track that the row at a place, unshuffled, is taken from, and how many were before.

        Of the first n rows a track has its share of n rounded down, the next tracks share what is left over
        alike: each has its part of any n rows, to a row for each track.
        """
        for track, share in enumerate(self._shares):
            taken = place * share.numerator // share.denominator
            if (place + 1) * share.numerator // share.denominator > taken:
                return track, taken
            place -= taken
        raise AssertionError("the last track takes all that is left over")
