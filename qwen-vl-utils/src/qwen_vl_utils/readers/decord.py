"""Reader on decord."""

import io
from pathlib import Path

import decord  # pyright: ignore[reportMissingImports]
import torch

from ..errors import VideoError
from . import Choose, Decoded


def read(source: Path | bytes, choose: Choose, threads: int) -> Decoded:
    """See `readers`."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        video = decord.VideoReader(opened, num_threads=threads)
        total, fps = len(video), float(video.get_avg_fps())
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(f"decord: {error}") from error
    if not total or not fps > 0:
        raise VideoError(f"decord: {total} frames at {fps} frames per second")
    indices = list(choose(total, fps))
    try:
        frames = torch.from_numpy(video.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
        starts = video.get_frame_timestamp([0, *indices])[:, 0].tolist()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise VideoError(f"decord: {error}") from error
    return Decoded(
        frames=frames,
        indices=tuple(indices),
        seconds=tuple(second - starts[0] for second in starts[1:]),
        fps=fps,
        total_frames=total,
    )
