"""Reading a video file: by a reader of ours in a decoder process, or by a function that somebody registered.

item --sample--> which frames --session--> frame after frame --FrameResizer--> [n, 3, H, W]
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from . import media
from .cache import PixelCache
from .containers import HEAD_BYTES, check_container
from .errors import MediaError, VideoError
from .policy import PERMISSIVE, Deadline, MediaPolicy
from .readers import Header
from .resize import FrameResizer
from .videos import Video, VideoMetadata, VideoSize

if TYPE_CHECKING:
    import torch

    from .readers.processes import Session

T = TypeVar("T")
logger = logging.getLogger(__name__)
ANNOUNCED = 100
"""Reasons of readers that are remembered: a data set of one kind is not announced file by file."""
_announced: set[str] = set()

Sample = Callable[[Mapping[str, Any], int, float], tuple[list[int], int]]
"""(item, total frames, frames per second) -> (indices of the frames to take, frames they are taken from)."""

SizeOf = Callable[[int, int, int], tuple[int, int]]
"""(frames, height, width) -> (height, width) of the result."""


class _Clip(NamedTuple):
    """The part of an open video that an item asks for."""

    session: "Session"
    indices: list[int]
    clip_frames: int


@dataclass(frozen=True)
class FileReader:
    """One of our readers. Called with an item it does what the functions of 0.0.14 under these names did."""

    name: str
    sample: Sample

    def __call__(self, ele: Mapping[str, Any]) -> tuple["torch.Tensor", VideoMetadata, float]:
        """Frames uint8 [n, 3, h, w], metadata, frames taken per second."""
        import torch

        deadline = PERMISSIVE.start()
        located = locate_video(ele["video"], PERMISSIVE, deadline)
        size_of = lambda frames, height, width: (height, width)  # noqa: E731
        frames, metadata = self.read(ele, located, size_of, torch.uint8, PERMISSIVE, deadline)
        return frames, metadata, metadata.sample_fps

    def read(
        self,
        ele: Mapping[str, Any],
        located: Path | bytes,
        size_of: SizeOf,
        dtype: "torch.dtype",
        policy: MediaPolicy,
        deadline: Deadline,
        cache: PixelCache | None = None,
    ) -> Video:
        """The sampled frames [n, 3, height, width], each resized as it arrives.

        Raises VideoError where this reader can't decode the file, MediaError for what no reader can mend.
        """
        import torch

        with self._clip(ele, located, policy, deadline) as clip:
            count, header = len(clip.indices), clip.session.header
            target = size_of(count, header.height, header.width)

            def decode(dtype: torch.dtype) -> tuple[torch.Tensor, list[float]]:
                frames = torch.empty((count, 3, *target), dtype=dtype)
                return frames, clip.session.frames(clip.indices, frames.numpy())

            if cache is None:
                frames, seconds = decode(dtype)
            else:
                frames, seconds = self._cached(cache, located, clip, target, decode)
        return Video(frames.to(dtype), self._metadata(ele, clip, seconds))

    def _cached(
        self,
        cache: PixelCache,
        located: Path | bytes,
        clip: _Clip,
        target: tuple[int, int],
        decode: "Callable[[torch.dtype], tuple[torch.Tensor, list[float]]]",
    ) -> "tuple[torch.Tensor, list[float]]":
        import numpy as np
        import torch

        def make() -> dict[str, np.ndarray]:
            frames, seconds = decode(torch.uint8)
            return {"frames": frames.numpy(), "seconds": np.asarray(seconds)}

        what = {"video": target, "indices": clip.indices, "reader": self.name}
        arrays = cache.get(located, what, make)
        return torch.from_numpy(arrays["frames"]), arrays["seconds"].tolist()

    def measure(
        self,
        ele: Mapping[str, Any],
        located: Path | bytes,
        size_of: SizeOf,
        policy: MediaPolicy,
        deadline: Deadline,
    ) -> VideoSize:
        """What `read` would return, without decoding it; raises as `read` does."""
        with self._clip(ele, located, policy, deadline) as clip:
            count, header = len(clip.indices), clip.session.header
            seconds = clip.session.seconds(clip.indices)
        natural = header.height, header.width
        return VideoSize(count, *size_of(count, *natural), natural, self._metadata(ele, clip, seconds))

    @contextmanager
    def _clip(
        self, ele: Mapping[str, Any], located: Path | bytes, policy: MediaPolicy, deadline: Deadline
    ) -> Iterator[_Clip]:
        from .readers.processes import session

        name = media.describe(ele["video"])
        if not isinstance(located, bytes) and "%" in located.name:
            located = located.read_bytes()  # FFmpeg takes a%d.png for a series of pictures
        source = located if isinstance(located, bytes) else str(located)
        with session(self.name, source, decoder_threads(), policy.max_pixels, deadline, name) as opened:
            header = opened.header
            policy.check_size(header.width, header.height, name)
            policy.check_seconds(header.total_frames / header.fps, name)
            indices, clip_frames = self._sampled(ele, header, name)
            policy.check_frames(len(indices), name)
            yield _Clip(opened, indices, clip_frames)

    def _sampled(self, ele: Mapping[str, Any], header: Header, name: str) -> tuple[list[int], int]:
        try:
            return self.sample(ele, header.total_frames, header.fps)
        except ValueError as error:
            raise MediaError(f"{name}: {error}") from error

    def _metadata(self, ele: Mapping[str, Any], clip: _Clip, seconds: list[float]) -> VideoMetadata:
        header = clip.session.header
        return VideoMetadata(
            fps=header.fps,
            frames_indices=tuple(clip.indices),
            timestamps=tuple(seconds),
            total_num_frames=header.total_frames,
            video_backend=self.name,
            sample_fps=len(clip.indices) / clip.clip_frames * header.fps,
            clip=(ele.get("video_start"), ele.get("video_end")),
        )


def decoder_threads() -> int:
    """Threads of one decoder: TORCHCODEC_NUM_THREADS, else 8 or as many as there are cores."""
    given = os.environ.get("TORCHCODEC_NUM_THREADS")
    return min(8, os.cpu_count() or 8) if given is None else int(given)


def locate_video(source: Any, policy: MediaPolicy, deadline: Deadline) -> Path | bytes:
    """`media.locate`, for a file that a decoder may see: one that holds its pictures itself."""
    located = media.locate(source, policy, deadline)
    check_container(_head(located), media.describe(source))
    return located


def first_that_can(readers: Sequence[tuple[str, Any]], name: str, use: Callable[[str, Any], T]) -> T:
    """What `use` gives with the first reader that can decode the video `name`; others are announced."""
    failures = []
    for number, (reader, entry) in enumerate(readers, 1):
        try:
            return use(reader, entry)
        except VideoError as error:
            failures.append(str(error))
            if number < len(readers):
                logger.warning("%s can't be read with %s (%s); trying the next reader", name, reader, error)
    raise VideoError(f"{name}: no reader can decode it: {'; '.join(failures)}")


def _head(located: Path | bytes) -> bytes:
    if isinstance(located, bytes):
        return located[:HEAD_BYTES]
    try:
        with located.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise VideoError(f"{located} can't be read: {error.strerror}") from error


def resized(frames: "torch.Tensor", size_of: SizeOf, dtype: "torch.dtype") -> "torch.Tensor":
    """Frames [n, 3, h, w] that somebody's own reader decoded, resized as ours are."""
    import torch

    count, _, height, width = frames.shape
    target = size_of(count, height, width)
    result, resizer = torch.empty((count, 3, *target), dtype=dtype), FrameResizer((height, width), target)
    for out, frame in zip(result, frames, strict=True):
        resizer.into(frame.permute(1, 2, 0).contiguous().numpy(), out)
    return result


def own_metadata(metadata: Mapping[str, Any], reader: str, sample_fps: float) -> VideoMetadata:
    """Metadata in our type, also from a reader that somebody registered."""
    if isinstance(metadata, VideoMetadata):
        return metadata
    indices = tuple(int(index) for index in metadata["frames_indices"])
    return VideoMetadata(
        fps=metadata["fps"],
        frames_indices=indices,
        timestamps=tuple(index / metadata["fps"] for index in indices),
        total_num_frames=metadata["total_num_frames"],
        video_backend=metadata.get("video_backend", reader),
        sample_fps=sample_fps,
    )
