"""Video-MME (Fu et al. 2024, arXiv 2405.21075): four-option questions about videos, short to an hour long.

    *.parquet -> row -> question, with --use-subtitle what is said at the frames -> letter
    data/ID.mp4 (or videos/), subtitle/ID.srt

Published are 900 videos, 300 of each duration, with three questions each.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from qwen_vl_serve import Message, Sampling
from qwen_vl_utils import MediaError
from qwenvl_eval.presets import INSTRUCT, THINK
from qwenvl_eval.scoring import Scorer, choice, videomme
from qwenvl_eval.task import Dataset, Judged, Metric, Sample, Task, option

DURATIONS = ("short", "medium", "long")
VIDEOS_EACH = 300

COLUMNS = (
    "video_id duration domain sub_category url videoID question_id task_type question options answer"
).split()
GROUPS = ("duration", "domain", "sub_category", "task_type")

INSTRUCTION = (
    "Choose the option that best answers the question about the video. "
    "Reply with nothing but its letter: A, B, C or D."
)

ROWS = 256
"""Rows of the parquet file that are in memory together."""

_OPTION = re.compile(r"\s*([A-D])[.)]\s*(.*)", re.DOTALL)
_TIME = r"(\d{1,3}):(\d{2}):(\d{2})[,.](\d{1,3})"
_CUE = re.compile(
    rf"^[ \t]*{_TIME}[ \t]*-->[ \t]*{_TIME}[^\n]*\n(.*?)(?=\n[ \t]*(?:\n|\Z)|\Z)", re.DOTALL | re.MULTILINE
)
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|\{\\[^{}]*\}")


@dataclass(frozen=True)
class Videomme(Task):
    """Questions about videos."""

    title: ClassVar[str] = "Video-MME"
    protocols: ClassVar[Mapping[str, Scorer]] = {"official": videomme.official, "strict": choice.strict}
    tables: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("duration", "domain"),
        ("sub_category",),
        ("task_type",),
    )
    presets: ClassVar[Mapping[str, Sampling]] = {"instruct": INSTRUCT, "think": THINK}
    judged: ClassVar[str] = "strict"
    reads_truncated: ClassVar[frozenset[str]] = frozenset({"official"})

    duration: str = option("sum", "short, medium, long, or sum for all three")
    use_subtitle: bool = option(False, "add what is said at the frames that the model sees")
    sys_prompt: str = option("", "file whose text is the system prompt")
    max_samples: int = option(0, "only the first N questions")
    fps: float = option(2.0, "frames per second")
    min_frames: int = option(4, "fewest frames of a video")
    max_frames: int = option(512, "most frames of a video")
    min_pixels: int = option(128 * 32 * 32, "fewest pixels of a frame; 0 leaves it to the checkpoint")
    max_pixels: int = option(512 * 32 * 32, "most pixels of a frame; 0 leaves it to the checkpoint")
    total_pixels: int = option(
        24576 * 32 * 32,
        "most pixels of a video, a pair of frames counted once; 0 leaves it to the checkpoint",
    )

    def __post_init__(self) -> None:
        if self.duration not in (*DURATIONS, "sum"):
            raise ValueError(f"duration={self.duration!r}; give one of {', '.join(DURATIONS)}, sum")

    def open(self, data: Path) -> Dataset:
        """``data``: the folder with the parquet file in it or in ``videomme/``, or that file.

        Every row is read, and its video is looked for. Raises ValueError naming the file, what was found and
        what to do.
        """
        source = _Source.find(data)
        files = list(source.parquets)
        if self.sys_prompt:
            files.append(_system_prompt(self.sys_prompt))
        ids: set[str] = set()
        missing: dict[str, None] = {}
        for row in self._rows(source):
            id = row["question_id"]
            if id in ids:
                raise ValueError(f"{row['where']}: a second question_id {id!r}; each must stand once")
            ids.add(id)
            if source.video(row["videoID"]) is None:
                missing[row["videoID"]] = None
        if not ids:
            raise ValueError(
                f"{source.parquets[0]}: no questions of duration {self.duration!r}; fetch it again"
            )
        if missing:
            raise ValueError(
                f"{source.folder / 'data' / next(iter(missing))}.mp4: no such file, nor in videos/ "
                f"({len(missing)} videos are not there); put them there, or ask for less with --duration"
            )
        if self.use_subtitle and not source.subtitles.is_dir():
            raise ValueError(f"{source.subtitles}: no such folder; put the .srt files there")
        return Dataset(tuple(files), len(ids), lambda: self._samples(source))

    def metrics(self, protocol: str, judged: Sequence[Judged]) -> list[Metric]:
        """Of the official protocol: right answers over those with a letter, as its script counts."""
        if protocol != "official":
            return []
        answered: defaultdict[str, list[bool]] = defaultdict(list)
        videos: defaultdict[str, set[str]] = defaultdict(set)
        for one in judged:
            videos[one.groups["duration"]].add(one.cluster)
            if one.verdict.extracted:
                answered[one.groups["duration"]].append(one.verdict.right)
        every = [right for each in answered.values() for right in each]
        if not every:
            return []
        parts = {name: sum(answered[name]) / len(answered[name]) for name in DURATIONS if answered[name]}
        notes = [f"{len(judged) - len(every)} of {len(judged)} answers without a letter are left out"]
        if any(len(videos[name]) != VIDEOS_EACH for name in DURATIONS):
            counts = ", ".join(f"{len(videos[name])} {name}" for name in DURATIONS)
            notes.append(f"{VIDEOS_EACH} videos of each duration are published, here are {counts}")
        return [Metric("overall", sum(every) / len(every), "; ".join(notes), parts)]

    def _rows(self, source: _Source) -> Iterator[dict[str, Any]]:
        wanted = (row for row in source.rows() if self.duration in ("sum", row["duration"]))
        return islice(wanted, self.max_samples or None)

    def _samples(self, source: _Source) -> Iterator[Sample]:
        system: list[Message] = []
        if self.sys_prompt:
            system = [{"role": "system", "content": _system_prompt(self.sys_prompt).read_text("utf-8")}]
        names = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
        limits = {name: value for name in names if (value := getattr(self, name))}
        heard: tuple[str, str] = "", ""
        for row in self._rows(source):
            id = row["videoID"]
            video = {"type": "video", "video": str(source.video(id)), **limits}
            if self.use_subtitle and heard[0] != id:
                heard = id, subtitles(source.subtitles / f"{id}.srt", video)
            text = _question(row, heard[1])
            yield Sample(
                id=row["question_id"],
                messages=[*system, {"role": "user", "content": [video, {"type": "text", "text": text}]}],
                target={"answer": row["answer"], "options": row["options"]},
                cluster=id,
                groups={name: row[name] for name in GROUPS},
            )


@dataclass(frozen=True)
class _Source:
    """Where the benchmark's files lie."""

    folder: Path
    parquets: tuple[Path, ...]

    @classmethod
    def find(cls, data: Path) -> _Source:
        if data.is_file():
            return cls(data.parent.parent if data.parent.name == "videomme" else data.parent, (data,))
        for folder in (data, data / "videomme"):
            if parquets := sorted(folder.glob("*.parquet")):
                return cls(data, tuple(parquets))
        raise ValueError(f"{data}: no .parquet there or in videomme/; put the published file there")

    @property
    def subtitles(self) -> Path:
        return self.folder / "subtitle"

    def video(self, id: str) -> Path | None:
        paths = (self.folder / name / f"{id}.mp4" for name in ("data", "videos"))
        return next((path for path in paths if path.is_file()), None)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Checked rows with ``where`` to name them; ``options`` as letter -> text."""
        import pyarrow
        import pyarrow.parquet

        for path in self.parquets:
            number = 0
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
                    if missing:
                        raise ValueError(f"{path}: no column {', '.join(missing)}; give the published file")
                    for batch in file.iter_batches(batch_size=ROWS, columns=COLUMNS):
                        for row in batch.to_pylist():
                            yield _checked(row, f"{path}: row {number} (counted from 0)")
                            number += 1
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{path}: not a parquet file ({error}); fetch it again") from error


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name in (*GROUPS, "videoID", "question_id", "question", "answer"):
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"{where}: {name} is {row[name]!r}; a text is expected")
    if row["duration"] not in DURATIONS:
        raise ValueError(
            f"{where}: duration is {row['duration']!r}; it must be one of {', '.join(DURATIONS)}"
        )
    found = [_OPTION.fullmatch(one) for one in row["options"] or []]
    options = {one[1]: one[2].strip() for one in found if one}
    if not options or list(options) != list("ABCD"[: len(found)]):
        raise ValueError(f'{where}: options are {row["options"]!r}; a list of "A. ...", "B. ..." is expected')
    if row["answer"] not in options:
        raise ValueError(f"{where}: answer is {row['answer']!r}; it must be one of {', '.join(options)}")
    return {**row, "options": options, "where": where}


def _question(row: Mapping[str, Any], heard: str) -> str:
    lines = ["The subtitles of this video:", heard] if heard else []
    lines += [INSTRUCTION, f"Question: {row['question']}"]
    lines += [f"{letter}. {text}" for letter, text in row["options"].items()]
    return "\n".join([*lines, "The best answer is:"])


def _system_prompt(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"sys_prompt {name}: no such file; give one that holds the system prompt")
    return path


def subtitles(path: Path, video: Mapping[str, Any]) -> str:
    """What is said at the frames that are taken of ``video``, a message item, as the official code picks it.

    "" where the video has no subtitles, as not all of the published ones have, and where it cannot be read:
    the back end says so about its questions.
    """
    if not path.is_file():
        return ""
    from qwen_vl_utils.loading import measure_video
    from qwen_vl_utils.vision_process import rules

    any_size = rules(1, (0, math.inf), lambda item, frames: (0, math.inf))
    try:
        frames = measure_video(video, any_size).metadata.timestamps
    except MediaError:
        return ""
    said = [text for start, end, text in cues(path) if any(start < time < end for time in frames)]
    return " ".join(said)


def cues(path: Path) -> list[tuple[float, float, str]]:
    """(start, end, text) of each subtitle of an .srt file: seconds, and lines joined without markup.

    Raises ValueError for a file in which there is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); fetch it again") from error
    found = []
    for cue in _CUE.finditer(text):
        start, end = (
            int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(part.ljust(3, "0")) / 1000
            for hours, minutes, seconds, part in (cue.groups()[:4], cue.groups()[4:8])
        )
        if words := " ".join(_MARKUP.sub("", cue[9]).split()):
            found.append((start, end, words))
    if not found and text.strip():
        raise ValueError(f"{path}: no subtitles in it; an .srt file is expected, fetch it again")
    return found
