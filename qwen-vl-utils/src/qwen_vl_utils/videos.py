"""Videos: which frames, when they are shown, and how large.

file       --reader, in a decoder process--> frame, second --FrameResizer--> uint8 [n, 3, H, W], VideoMetadata
frame list --open_image--> n pictures                      --resize-->       uint8 [n, 3, H, W], VideoMetadata
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .errors import VideoError

if TYPE_CHECKING:
    import torch
    from PIL import Image

EXACT_SECONDS = 2e-3
"""Where index / fps misses a frame's time by more, the rate varies; many containers count in thousandths."""


@dataclass(frozen=True, eq=False, repr=False)
class VideoMetadata(dict):
    """Where and when the frames of one video come from.

    The attributes say what is true. The items are the four entries that 0.0.14 returned and that the model
    library's processors and vLLM read: `fps`, `frames_indices`, `total_num_frames`, `video_backend`. They
    divide an index by `fps` to get a time, so at a variable rate `frames_indices` holds the (fractional)
    position at the average rate and at a constant rate the index itself.
    """

    fps: float
    """Average frames per second of the source."""
    frames_indices: tuple[int, ...]
    """Index of each frame in the source, clip or not."""
    timestamps: tuple[float, ...]
    """Presentation time of each frame in seconds; the source's first frame is at 0."""
    total_num_frames: int
    """Frames in the source, clip or not."""
    video_backend: str
    """The reader, or `frame_list`."""
    sample_fps: float
    """Frames taken per second of the source or clip."""
    clip: tuple[float | None, float | None] = (None, None)
    """`video_start` and `video_end` as asked for, in seconds."""

    def __post_init__(self) -> None:
        exact = all(
            abs(index / self.fps - second) <= EXACT_SECONDS
            for index, second in zip(self.frames_indices, self.timestamps, strict=True)
        )
        indices = self.frames_indices if exact else [second * self.fps for second in self.timestamps]
        self.update(
            fps=self.fps,
            frames_indices=list(indices),
            total_num_frames=self.total_num_frames,
            video_backend=self.video_backend,
        )


class Video(NamedTuple):
    """Decoded frames, [n, 3, height, width] in 0..255, and what is known about them."""

    frames: "torch.Tensor"
    metadata: VideoMetadata


class VideoSize(NamedTuple):
    """What a video will be, known without its pixels."""

    frames: int
    height: int
    width: int
    natural: tuple[int, int]
    """(height, width) of the source."""
    metadata: VideoMetadata


def spread(start: int, end: int, count: int) -> list[int]:
    """`count` indices evenly from `start` to `end`, both included (rounded as 0.0.14 rounds)."""
    import torch

    return torch.linspace(start, end, count).round().long().tolist()


def frame_list_metadata(frames: int, sample_fps: float, raw_fps: float) -> VideoMetadata:
    """Metadata of `frames` pictures taken `sample_fps` times a second from a source of `raw_fps`."""
    if not (sample_fps > 0 and raw_fps > 0):
        raise VideoError(f"sample_fps={sample_fps} and raw_fps={raw_fps} must be positive")
    return VideoMetadata(
        fps=raw_fps,
        frames_indices=tuple(round(i * raw_fps / sample_fps) for i in range(frames)),
        timestamps=tuple(i / sample_fps for i in range(frames)),
        total_num_frames=round(frames * raw_fps / sample_fps),
        video_backend="frame_list",
        sample_fps=sample_fps,
    )


def stack(images: Sequence["Image.Image"], height: int, width: int, dtype: "torch.dtype") -> "torch.Tensor":
    """Pictures -> [n, 3, height, width], each resized once."""
    import numpy as np
    import torch

    frames = torch.empty((len(images), 3, height, width), dtype=dtype)
    for target, image in zip(frames, images, strict=True):
        pixels = np.array(image.resize((width, height)))
        target.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
    return frames
