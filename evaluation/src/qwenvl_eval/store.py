"""Predictions, kept as they arrive: one JSON object a line, the first of them says which run it is.

A run that was killed goes on from here. A last line that was only half written is dropped; every other damage
is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Run:
    """What a file of predictions belongs to. Two runs are the same when all but the paths agree.

    ``weights`` and ``annotations_sha256`` are SHA-256 in hexadecimal; ``samples`` is the scores' denominator.
    """

    model_path: str
    weights: str
    annotations: str
    annotations_sha256: str
    samples: int
    max_new_tokens: int

    def difference(self, other: Run) -> list[str]:
        """What differs, readable; nothing when ``other`` may go on in this one's file."""
        found = []
        for name in (field.name for field in fields(self) if field.name not in ("model_path", "annotations")):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {str(mine)[:12]} there, {str(theirs)[:12]} here")
        return found


@dataclass(frozen=True)
class Prediction:
    """One answer, unscored. ``seconds`` is its share of its batch's time, loading of media included."""

    row: int
    media: list[str]
    question: str
    target: str
    answer: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class Store:
    """A file of predictions being written. ``with Store(path, run) as store: ...``

    Raises ValueError where the file holds another run or is damaged.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        complete = _drop_half_line(path)
        self.done: set[int] = set()
        if complete:
            found, predictions = read_predictions(path)
            difference = found.difference(run)
            if difference and predictions:
                raise ValueError(
                    f"{path} holds the predictions of another run ({'; '.join(difference)}); "
                    "choose another file or delete this one"
                )
            if difference:  # a run that never got to its first answer
                os.truncate(path, 0)
                complete = False
            self.done = {prediction.row for prediction in predictions}
        self._file = path.open("a", encoding="utf-8")
        if not complete:
            self._write([{"run": asdict(run)}])

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Append; when this returns the lines have left the process, so a kill cannot take them back."""
        predictions = list(predictions)
        self._write(asdict(prediction) for prediction in predictions)
        self.done.update(prediction.row for prediction in predictions)

    def _write(self, records: Iterable[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_predictions(path: Path) -> tuple[Run, list[Prediction]]:
    """Read a file a :class:`Store` wrote: the run and its predictions so far, in order of their rows.

    Raises ValueError naming file and line for a line that is no prediction, or a row answered twice.
    """
    run: Run | None = None
    found: dict[int, Prediction] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if number == 1:
                    run = Run(**record["run"])
                    continue
                prediction = Prediction(**record)
            except (ValueError, TypeError, KeyError) as error:
                what = "the run" if number == 1 else "a prediction"
                raise ValueError(f"{path}, line {number}: not {what}: {error!r}; delete the file") from error
            if prediction.row in found:
                raise ValueError(
                    f"{path}, line {number}: row {prediction.row} is there twice; delete the file"
                )
            found[prediction.row] = prediction
    if run is None:
        raise ValueError(f"{path}: no predictions in it; write them with: qwenvl-eval run")
    return run, [found[row] for row in sorted(found)]


def _drop_half_line(path: Path) -> bool:
    """Cut what follows the last line end; whether a complete line remains."""
    if not path.exists():
        return False
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        os.truncate(path, end)
    return end > 0
