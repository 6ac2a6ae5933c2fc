"""The rows of a JSONL file by their number, of which no process reads the whole file.

    FILE.jsonl     -> find_rows     an index of where each row begins, built where none fits the file
    FILE.jsonl.gz  -> unpacked once, then as above
      -> Lines.row(k)               the bytes of row k, read alone and parsed

The index, int64, memory-mapped, 8 bytes a row:

    FORMAT, size and mtime [ns] of the file, n | starts [n], size | of each blank line, the rows before it

It lies beside the file, as `.FILE.jsonl.rows`, or where nothing may be written there in `~/.cache/qwenvl`
(`XDG_CACHE_HOME`), and is found again as long as size and mtime are the same. All processes of a run build it
together: each scans a share of the bytes for the rows that begin there, and writes their starts behind those
of the processes before it. Where processes don't see each other's disks, one is built on each. The file takes
its name when it is complete.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO, cast

import numpy as np
from torch import distributed

from qwenvl.data.sources import open_lines, parse_row

logger = logging.getLogger(__name__)

FORMAT = int.from_bytes(b"qwenrow1", "little")
HEADER = 4
CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(rb"[ \t\r\v\f]*+(?:\n|\Z)")
_SPACE = np.isin(np.arange(256), list(b" \t\r\v\f\n"))


@dataclass(frozen=True, eq=False)
class Lines:
    """The rows of a `.jsonl` or `.jsonl.gz` file. plain: the file itself or what it was unpacked to."""

    path: Path
    plain: Path
    index: Path

    def __len__(self) -> int:
        return len(self._starts) - 1

    def where(self, index: int) -> str:
        """How messages name a row."""
        return f"{self.path}: line {index + 1 + self._blanks.searchsorted(index, 'right')} (counted from 1)"

    def row(self, index: int) -> object:
        """Read and parse one row. Raises ValueError, naming file and row, where it is not JSON."""
        where, (first, last) = self.where(index), self._starts[index : index + 2].tolist()
        try:
            line = os.pread(self._descriptor, last - first, first)
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}; correct annotation_path") from error
        if len(line) < last - first or not (line.endswith(b"\n") or index == len(self) - 1):
            raise ValueError(f"{where}: the file is not as it was when its rows were found; start again")
        return parse_row(line.rstrip(), where)

    # Copies that are sent to another process open the files anew.
    def __reduce__(self) -> tuple:
        return Lines, (self.path, self.plain, self.index)

    @cached_property
    def _entries(self) -> np.ndarray:
        return np.memmap(self.index, np.int64, "r")

    @cached_property
    def _starts(self) -> np.ndarray:
        return self._entries[HEADER : HEADER + int(self._entries[HEADER - 1]) + 1]

    @cached_property
    def _blanks(self) -> np.ndarray:
        return self._entries[HEADER + len(self._starts) :]

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.plain, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def find_rows(path: Path) -> Lines:
    """The rows of a file. With torch.distributed every process has to ask, of the same path.

    Raises ValueError, naming the file, where it cannot be read, has no rows, or changes meanwhile.
    """
    plain = _unpacked(path) if path.suffix == ".gz" else path
    stamp = _stamp(plain)
    index = _found(plain, stamp)
    if not all(_tell(index is not None)):
        index = _build(plain, stamp)
    assert index is not None
    lines = Lines(path, plain, index)
    if not len(lines):
        raise ValueError(f"annotation file {path} has no rows")
    return lines


def _stamp(path: Path) -> tuple[int, int]:
    """Size in bytes, and time of the last change in ns."""
    with open_lines(path):  # its message, where there is no such file
        found = path.stat()
    return found.st_size, found.st_mtime_ns


def _places(path: Path, kind: str) -> list[Path]:
    """Where a file that is made from another may lie: the best place first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenvl"
    whose = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return [path.with_name(f".{path.name}.{kind}"), cache / f"{whose}.{path.name}.{kind}"]


def _place(path: Path, kind: str) -> Path:
    """Where to write a file that is made from another."""
    beside, cached = _places(path, kind)
    if os.access(path.parent, os.W_OK | os.X_OK):
        return beside
    cached.parent.mkdir(parents=True, exist_ok=True)
    return cached


def _found(path: Path, stamp: tuple[int, int]) -> Path | None:
    """An index that fits the file as it is."""
    for index in _places(path, "rows"):
        if os.access(index, os.R_OK) and np.fromfile(index, np.int64, 3).tolist() == [FORMAT, *stamp]:
            return index
    return None


def _tell(value: Any) -> list:
    """What each process says, by rank."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    said: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(said, value)
    return said


@dataclass(frozen=True)
class _Share:
    """Processes that see one folder: their ranks, and which of them this one is. own: a file of this process
    in the folder, as long as it is needed; part: the name of what they write together until it is complete.
    """

    ranks: list[int]
    at: int
    own: BinaryIO
    part: Path


@contextmanager
def _share(place: Path) -> Iterator[_Share]:
    """What `_Share` says, of the folder of `place`, which gets what was written to `part`."""
    with NamedTemporaryFile(prefix=f"{place.name}.", dir=place.parent) as own:
        name = str(place.with_name(Path(own.name).name))
        names = _tell(name)
        mine = names.index(name)
        leaders = _tell(next(rank for rank, each in enumerate(names) if os.path.exists(each)))
        ranks = [rank for rank, leader in enumerate(leaders) if leader == leaders[mine]]
        part = Path(f"{names[ranks[0]]}.part")
        try:
            yield _Share(ranks, ranks.index(mine), cast(BinaryIO, own), part)
            _tell("all have written")
            if mine == ranks[0]:
                os.replace(part, place)
            _tell("it has its name")
        finally:
            if mine == ranks[0]:
                part.unlink(missing_ok=True)


def _build(path: Path, stamp: tuple[int, int]) -> Path:
    """Index a file together with all processes."""
    size, index = stamp[0], _place(path, "rows")
    logger.info("%s: looking for the rows in %.3g GB, once; index: %s", path, size / 1e9, index)
    with _share(index) as share:
        first, last = (size * at // len(share.ranks) for at in (share.at, share.at + 1))
        rows, blanks = _scan(path, first, last, share.own)
        if _stamp(path) != stamp:
            raise ValueError(
                f"annotation file {path} changes while it is read; start again when it is written"
            )
        told = _tell((rows, len(blanks)))
        counts = np.array([told[rank] for rank in share.ranks])
        (before, blanks_before), total = counts[: share.at].sum(0).tolist(), int(counts[:, 0].sum())
        if share.at == 0:
            with share.part.open("wb") as file:
                np.array([FORMAT, *stamp, total]).tofile(file)
                file.seek(8 * (HEADER + total))
                np.array([size]).tofile(file)
        _tell("the file is there")
        with share.part.open("r+b") as file:
            share.own.seek(0)
            file.seek(8 * (HEADER + before))
            shutil.copyfileobj(share.own, file, CHUNK)
            file.seek(8 * (HEADER + total + 1 + blanks_before))
            (blanks + before).tofile(file)
    return index


def _scan(path: Path, first: int, last: int, out: BinaryIO) -> tuple[int, np.ndarray]:
    """Write the starts of the rows that begin from byte `first` up to `last`; returns how many there are, and
    for each blank line how many come before it, int64 [blank lines].
    """
    if first == last:
        return 0, np.zeros(0, np.int64)
    rows, blanks = 0, [np.zeros(0, np.int64)]
    buffer = bytearray(CHUNK + 1)
    chunk = np.frombuffer(buffer, np.uint8)
    with path.open("rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        begin = len(_BOM) if whole[:3] == _BOM else 0
        for at in range(max(first, begin), last, CHUNK):
            count = os.preadv(file.fileno(), [memoryview(buffer)[1 : min(CHUNK, last - at) + 1]], at)
            buffer[0] = whole[at - 1] if at > begin else ord("\n")
            starts = at + np.flatnonzero(chunk[:count] == ord("\n"))
            starts = starts[starts < len(whole)]
            spaced = np.flatnonzero(_SPACE[chunk[starts - at + 1]])
            blank = np.array([i for i in spaced.tolist() if _BLANK.match(whole, starts[i])], np.int64)
            blanks.append(rows + blank - np.arange(len(blank)))
            starts = np.delete(starts, blank)
            starts.tofile(out)
            rows += len(starts)
    return rows, np.concatenate(blanks)


def _unpacked(path: Path) -> Path:
    """What a `.gz` file holds, as a file that has its mtime."""
    mtime = _stamp(path)[1]
    found = [each for each in _places(path, "unpacked") if each.exists() and each.stat().st_mtime_ns == mtime]
    if all(_tell(bool(found))):
        return found[0]
    place = _place(path, "unpacked")
    logger.info("%s: unpacked, once, to %s", path, place)
    with _share(place) as share:
        if share.at == 0:
            with open_lines(path) as packed, share.part.open("wb") as file:
                shutil.copyfileobj(packed, file, CHUNK)
            os.utime(share.part, ns=(mtime, mtime))
    return place
