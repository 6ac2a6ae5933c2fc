"""Predictions, kept as they arrive: one JSON object a line, the first of them says which run it is.

A run that was killed goes on from here. A last line that was only half written is dropped; every other damage
is an error. A sample that failed is asked again by the next run; its new line stands for the old one.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Run:
    """What a file of predictions belongs to, enough to do it again.

    Two runs are the same when ``task``, ``options``, ``weights``, ``data_sha256``, ``samples``,
    ``replicates`` and ``sampling`` agree; the other fields tell where from and by what. ``weights`` and
    ``data_sha256`` are SHA-256 in hexadecimal; ``samples`` times ``replicates`` is the scores' denominator.
    """

    task: str
    options: Mapping[str, Any]
    model: str
    weights: str
    data: str
    data_sha256: str
    samples: int
    sampling: Mapping[str, Any]
    replicates: int = 1
    engine: str = ""
    revision: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def difference(self, other: Run) -> list[str]:
        """What differs, readable; nothing when ``other`` may go on in this one's file."""
        found = []
        for name in ("task", "options", "weights", "data_sha256", "samples", "replicates", "sampling"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {_short(mine, theirs)} there, {_short(theirs, mine)} here")
        return found


@dataclass(frozen=True)
class Prediction:
    """One answer, unscored.

    ``index`` is the sample's place in the data; ``key`` hashes all that was asked, see
    ``runner.question_key``. ``finish_reason``: "stop", "length" (cut at the token limit), "tool_calls",
    "refused" (this question will never be answered; ``error`` says why) or "failed". ``prompt`` is what was
    sent, media replaced by what ``media`` describes: SHA-256, height and width [pixels] that the model saw,
    indices of video frames. ``seconds`` is its share of the time: of a batch, and of requests that ran side
    by side, each gets a part.
    """

    id: str
    index: int
    replicate: int
    key: str
    prompt: Sequence[Mapping[str, Any]]
    media: Sequence[Mapping[str, Any]]
    answer: str
    reasoning: str
    finish_reason: str
    error: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    target: Mapping[str, Any]
    cluster: str
    groups: Mapping[str, str]


class Store:
    """A file of predictions being written. ``with Store(path, run) as store: ...``; several threads may add.

    Raises ValueError where the file holds another run or is damaged.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        complete = drop_half_line(path)
        self._done: set[int] = set()
        if complete:
            found = Predictions(path)
            difference = found.run.difference(run)
            if difference and len(found):
                raise ValueError(
                    f"{path} holds the predictions of another run ({'; '.join(difference)}); "
                    "choose another file or delete this one"
                )
            if difference:  # a run that never got to its first answer
                os.truncate(path, 0)
                complete = False
            self._done = found.answered
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")
        if not complete:
            self._write([{"run": asdict(run)}])

    def __contains__(self, key: str) -> bool:
        """Whether the question with this key has its answer."""
        return _number(key) in self._done

    def __len__(self) -> int:
        return len(self._done)

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Append; when this returns the lines have left the process, so a kill cannot take them back."""
        predictions = list(predictions)
        with self._lock:
            self._write(vars(prediction) for prediction in predictions)
            self._done.update(_number(p.key) for p in predictions if p.finish_reason != "failed")

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class Predictions:
    """A file that a :class:`Store` wrote: ``run``, and the predictions so far in the order of the data.

    Only where each line begins is kept in memory, and, shortened, the keys of those that did not fail:
    ``answered``. Raises ValueError naming file and line for a line that is no prediction.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        run: Run | None = None
        found: dict[tuple[int, int], tuple[int, int]] = {}
        keys: dict[tuple[int, int], int | None] = {}
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                if number == 1:
                    run = _parse(path, number, line, lambda record: Run(**record["run"]))
                else:
                    prediction = _parse(path, number, line, _prediction)
                    place = prediction.index, prediction.replicate
                    found[place] = offset, number
                    failed = prediction.finish_reason == "failed"
                    keys[place] = None if failed else _number(prediction.key)
                offset += len(line)
        if run is None:
            raise ValueError(f"{path}: no predictions in it; write them with: qwenvl-eval infer")
        self.run = run
        self.answered = {key for key in keys.values() if key is not None}
        self._places = [found[place] for place in sorted(found)]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Prediction]:
        with self.path.open("rb") as file:
            for offset, number in self._places:
                file.seek(offset)
                yield _parse(self.path, number, file.readline(), _prediction)


def _prediction(record: dict[str, Any]) -> Prediction:
    return Prediction(**record)


def _parse(path: Path, number: int, line: bytes, make: Any) -> Any:
    try:
        return make(json.loads(line))
    except (ValueError, TypeError, KeyError) as error:
        what = "the run" if number == 1 else "a prediction"
        raise ValueError(f"{path}, line {number}: not {what}: {error!r}; delete the file") from error


def _number(key: str) -> int:
    """64 bits of a key: of 100,000 questions two collide once in four thousand million runs."""
    return int(key[:16], 16)


def _short(value: Any, other: Any) -> str:
    """A value, cut; of two mappings only what differs."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = {
            name: value.get(name) for name in sorted({*value, *other}) if value.get(name) != other.get(name)
        }
    return str(value)[:60] if isinstance(value, Mapping) else str(value)[:12]


def drop_half_line(path: Path) -> bool:
    """Cut what follows the last line end; whether a complete line remains."""
    if not path.exists():
        return False
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
    return end > 0
