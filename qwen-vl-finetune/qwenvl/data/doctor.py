"""Every row of the data sets of a run as training would take it, and what a person should look at.

    data sets -> check_annotations, SupervisedDataset.load    what training refuses is an error
      each row --loader processes--> RowReport: errors, warnings, tokens, patches, what carries loss, key
      -> Checkup: all findings, duplicates over rows, lengths

Rules about rows are training's own and stand where training has them; here stand only the warnings. A video
that does not decode is given up after two minutes without a sign of life, as in training.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from qwen_vl_utils import measure_media
from qwen_vl_utils.grounding import RELATIVE, Coordinates, parse_boxes
from qwenvl.data.budget import DROPPING
from qwenvl.data.data_processor import Encoder, Source, SupervisedDataset
from qwenvl.data.messages import Sample, is_url, says_something
from qwenvl.data.sources import Annotations, check_annotations, samples_of

TINY = 16
"""A side of a picture below this [pixels] is warned about."""

FLAT = 20
"""So is a picture that is this many times longer than wide."""


@dataclass(frozen=True)
class Finding:
    """Something about a row. kind: a short name, by which reports group; text names file and row."""

    level: str
    kind: str
    dataset: str
    row: int
    text: str


@dataclass(frozen=True)
class RowReport:
    """What one row becomes. tokens, patches, loss_tokens: of each of its samples; asked and answered: digests
    of what stands before the last answer, media included, and of all.
    """

    row: int
    findings: list[Finding]
    tokens: tuple[int, ...] = ()
    media_tokens: int = 0
    patches: int = 0
    loss_tokens: int = 0
    asked: str = ""
    answered: str = ""
    shortened: int = 0


@dataclass
class Checkup:
    """All that was found. rows: how many there are; good: (data set, report) of rows that training takes."""

    rows: int = 0
    findings: list[Finding] = field(default_factory=list)
    good: list[tuple[str, RowReport]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def clean_rows(self, dataset: str) -> list[int]:
        """The rows of a data set without an error, and of rows that are the same the first."""
        again = {one.row for one in self.findings if one.dataset == dataset and one.kind == DUPLICATE}
        return [report.row for name, report in self.good if name == dataset and report.row not in again]

    def lengths(self) -> np.ndarray:
        """Tokens of every sample that training takes, int64 [n]."""
        return np.array([length for _, report in self.good for length in report.tokens], np.int64)


DUPLICATE = "the same row again"
OTHER = "a row that breaks the format"


def examine(
    name: str, annotations: Annotations, data_path: str, encode: Encoder, coordinates: Coordinates, *,
    packed: bool, workers: int,
) -> Checkup:  # fmt: skip
    """Read, decode and encode every row of a data set.

    coordinates: what boxes in answers mean. packed: whether rows may be packs. workers: loader processes.
    """
    begin, checkup = time.perf_counter(), Checkup(rows=len(annotations))
    bad = check_annotations(annotations, data_path, refused=encode.refused, packed=packed)
    checkup.findings += [Finding("error", _kind(each.reason), name, each.row, each.reason) for each in bad]
    rows = np.setdiff1d(np.arange(len(annotations)), [each.row for each in bad])
    patient = _Patient(name, Source(name, annotations, data_path, rows), encode, coordinates)
    loader = DataLoader(patient, batch_size=None, num_workers=workers)
    for report in tqdm(loader, f"examining {name}", total=len(rows), unit="row"):
        checkup.findings += report.findings
        if all(finding.level != "error" for finding in report.findings):
            checkup.good.append((name, report))
    checkup.findings += _repeats(name, annotations, [report for _, report in checkup.good])
    checkup.findings.sort(key=lambda finding: finding.row)
    checkup.seconds = time.perf_counter() - begin
    return checkup


class _Patient(Dataset):
    """The rows of one data set, as reports."""

    def __init__(self, name: str, source: Source, encode: Encoder, coordinates: Coordinates) -> None:
        self.name, self.source, self.encode, self.coordinates = name, source, encode, coordinates
        self.rows = SupervisedDataset([source], encode, bad_samples="fail")

    def __len__(self) -> int:
        return len(self.source.rows)

    def __getitem__(self, index: int) -> RowReport:
        if index >= len(self):
            raise IndexError(index)
        row = int(self.source.rows[index])
        try:
            item = self.rows.load(index)
            shortened = self._shortened(index)
        except ValueError as error:
            return RowReport(row, [Finding("error", _kind(str(error)), self.name, row, str(error))])
        samples = [
            self.encode.read(fields, self.source.data_path)
            for fields in samples_of(self.source.annotations.row(row))
        ]
        where = self.source.annotations.where(row)
        warnings = [
            Finding("warning", kind, self.name, row, f"{where}: {text}")
            for sample in samples
            for kind, text in self._warnings(sample)
        ]
        weights = item.get("loss_weights", torch.ones(len(item["labels"])))
        loss = int(((item["labels"] != -100) & (weights > 0)).sum())
        processor = self.encode.processor
        media = torch.isin(
            item["input_ids"], torch.tensor([processor.image_token_id, processor.video_token_id])
        )
        patches = sum(len(item[name]) for name in ("pixel_values", "pixel_values_videos") if name in item)
        return RowReport(
            row, warnings, tuple(item["segment_lengths"].tolist()), int(media.sum()), patches, loss,
            *_digests(samples), shortened,
        )  # fmt: skip

    def _shortened(self, index: int) -> int:
        """How many of a row's samples --too_long takes something from."""
        if self.encode.too_long not in DROPPING:
            return 0
        return sum(bool(each.turns or each.media) for each in self.rows.fitted(index))

    def _warnings(self, sample: Sample) -> Iterator[tuple[str, str]]:
        weights = iter(sample.weights)
        for number, message in enumerate(sample.messages):
            content = message["content"]
            empty = not says_something(content)
            if message["role"] == "assistant":
                if next(weights) > 0 and empty and not message.get("tool_calls"):
                    yield "an empty answer", f"turn {number} (assistant) says nothing, and carries loss"
            elif message["role"] == "user" and empty:
                yield "an empty question", f"turn {number} (user) says nothing"
        if not any(sample.weights):
            yield "nothing to learn", "every answer has the weight 0"
        items = list(sample.media())
        sizes = measure_media(sample.messages, self.encode.processor) if items else []
        for item, size in zip(items, sizes, strict=True):
            height, width = size.natural
            name = item[item["type"]] if isinstance(item[item["type"]], str) else item["type"]
            if min(height, width) < TINY:
                yield "a tiny picture", f"{name} is {width} x {height} pixels"
            elif max(height, width) > FLAT * min(height, width):
                yield "a very long picture", f"{name} is {width} x {height} pixels"
        yield from self._box_warnings(sample, items, sizes)

    def _box_warnings(self, sample: Sample, items: list, sizes: list) -> Iterator[tuple[str, str]]:
        pictures = [size for item, size in zip(items, sizes, strict=True) if item["type"] == "image"]
        limits = [(RELATIVE, RELATIVE)] if self.coordinates == "relative" else []
        limits = limits or [(size.width, size.height) for size in pictures]
        for number, message in enumerate(sample.messages):
            if message["role"] != "assistant" or not pictures:
                continue
            for box in parse_boxes(message["content"]).items:
                corners = [round(corner) for corner in box.xyxy]
                if box.x1 == box.x2 or box.y1 == box.y2:
                    yield "a box without area", f"turn {number}: {corners} {box.label}"
                inside = min(box.xyxy) >= 0 and any(box.x2 <= x and box.y2 <= y for x, y in limits)
                if not inside:
                    unit = "0 to 1000" if self.coordinates == "relative" else "the resized picture's pixels"
                    yield "a box outside its picture", f"turn {number}: {corners} {box.label}, in {unit}"


def _digests(samples: list[Sample]) -> tuple[str, str]:
    """Of all that stands before the last answer, and of everything; a medium counts by its bytes."""
    asked, answered = hashlib.sha256(), hashlib.sha256()
    for sample in samples:
        for message in sample.messages:
            digest = _digest(message)
            answered.update(digest)
            if message is not sample.messages[-1]:
                asked.update(digest)
    return asked.hexdigest(), answered.hexdigest()


def _digest(message: dict[str, Any]) -> bytes:
    found = hashlib.sha256(repr({key: message[key] for key in sorted(message) if key != "content"}).encode())
    content = message["content"]
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        found.update(repr(sorted((key, item[key]) for key in item if key != item["type"])).encode())
        source = item[item["type"]]
        for part in source if isinstance(source, list) else [source]:
            if item["type"] != "text" and isinstance(part, str) and not is_url(part):
                with open(part, "rb") as file:
                    found.update(hashlib.file_digest(file, "sha256").digest())
            else:
                found.update(part if isinstance(part, bytes) else str(part).encode())
    return found.digest()


def _repeats(name: str, annotations: Annotations, reports: list[RowReport]) -> Iterator[Finding]:
    """Rows that are the same as one before, and rows that ask the same and answer otherwise."""
    whole: dict[str, int] = {}
    question: dict[str, int] = {}
    for report in reports:
        where = annotations.where(report.row)
        if report.answered in whole:
            first = annotations.where(whole[report.answered])
            yield Finding("warning", DUPLICATE, name, report.row, f"{where}: the same as {first}")
        elif report.asked in question:
            text = (
                f"{where}: asks what {annotations.where(question[report.asked])} asks, and answers otherwise"
            )
            yield Finding("warning", "two answers to one question", name, report.row, text)
        whole.setdefault(report.answered, report.row)
        question.setdefault(report.asked, report.row)


_KINDS = (
    ("a file that is not there, or empty", ("media file ",)),
    ("a file that cannot be read", ("not a readable picture", "no reader can decode", "aspect ratio")),
    ("too long", ("exceed --model_max_length",)),
    ("a special token in a text", ("special token",)),
    ("placeholders and media differ", ("placeholders for", "only user turns may")),
)


def _kind(reason: str) -> str:
    """The group of an error, from training's own words about it."""
    return next((kind for kind, words in _KINDS if any(word in reason for word in words)), OTHER)


def count_kinds(findings: list[Finding]) -> list[tuple[str, str, int]]:
    """(level, kind, how often), errors first, the most frequent first."""
    counted = Counter((finding.level, finding.kind) for finding in findings)
    return [(*key, count) for key, count in sorted(counted.items(), key=lambda one: (one[0][0], -one[1]))]


def default_workers() -> int:
    """As many loader processes as this process may use cores."""
    return len(os.sched_getaffinity(0))
