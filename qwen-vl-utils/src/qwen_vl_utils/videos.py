"""Videos: which frames, when they are shown, and how large.

file --reader--> frames uint8 [n, 3, h, w], seconds --resize--> uint8 [n, 3, H, W], VideoMetadata
frame list --open_image--> n pictures                --resize--> uint8 [n, 3, H, W], VideoMetadata
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .errors import VideoError
from .readers import Decoded

if TYPE_CHECKING:
    import torch
    from PIL import Image

EXACT_SECONDS = 1e-3
"""Where index / fps misses a frame's time by more, the rate is variable."""


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
    """Decoded frames, uint8 [n, 3, height, width], and what is known about them."""

    frames: "torch.Tensor"
    metadata: VideoMetadata


def spread(start: int, end: int, count: int) -> list[int]:
    """`count` indices evenly from `start` to `end`, both included (rounded as 0.0.14 rounds)."""
    import torch

    return torch.linspace(start, end, count).round().long().tolist()


def from_decoded(
    decoded: Decoded, reader: str, clip_frames: int, clip: tuple[float | None, float | None]
) -> Video:
    """A reader's frames with their metadata; `clip_frames` is the number of source frames sampled from."""
    metadata = VideoMetadata(
        fps=decoded.fps,
        frames_indices=decoded.indices,
        timestamps=decoded.seconds,
        total_num_frames=decoded.total_frames,
        video_backend=reader,
        sample_fps=len(decoded.indices) / clip_frames * decoded.fps,
        clip=clip,
    )
    return Video(decoded.frames, metadata)


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


def resize(frames: "torch.Tensor", height: int, width: int) -> "torch.Tensor":
    """uint8 [n, 3, h, w] -> uint8 [n, 3, height, width]; bicubic with antialiasing, equal to 0.0.14's."""
    import torch

    if frames.shape[-2:] == (height, width):
        return frames
    resized = torch.empty((len(frames), frames.shape[1], height, width), dtype=torch.uint8)
    # Frame by frame, in floating point: torch's 8-bit kernel clips between its two passes (off by up to
    # 10 levels at sharp edges), and a whole video of floats would be four times as large.
    for frame, target in zip(frames, resized, strict=True):
        scaled = torch.nn.functional.interpolate(
            frame[None].float(), size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
        target.copy_(scaled[0].clamp_(0, 255).round_())
    return resized


def stack(images: Sequence["Image.Image"], height: int, width: int) -> "torch.Tensor":
    """Pictures -> uint8 [n, 3, height, width], each resized once."""
    import numpy as np
    import torch

    frames = np.stack([np.asarray(image.resize((width, height))) for image in images])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)
