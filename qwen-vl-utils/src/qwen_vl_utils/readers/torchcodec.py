"""Reader on torchcodec (FFmpeg's shared libraries must be installed)."""

from pathlib import Path

from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

from ..errors import VideoError
from . import Choose, Decoded


def read(source: Path | bytes, choose: Choose, threads: int) -> Decoded:
    """See `readers`. The whole file is scanned once, so counts and times are exact."""
    try:
        decoder = VideoDecoder(source, num_ffmpeg_threads=threads)
    except (RuntimeError, ValueError) as error:
        raise VideoError(f"torchcodec: {error}") from error
    stream = decoder.metadata
    if not stream.num_frames or not stream.average_fps:
        raise VideoError(f"torchcodec: {stream.num_frames} frames at {stream.average_fps} frames per second")
    indices = list(choose(stream.num_frames, stream.average_fps))
    try:
        batch = decoder.get_frames_at(indices=indices)
    except (RuntimeError, ValueError, IndexError) as error:
        raise VideoError(f"torchcodec: {error}") from error
    start = stream.begin_stream_seconds or 0.0
    return Decoded(
        frames=batch.data,
        indices=tuple(indices),
        seconds=tuple(float(second) - start for second in batch.pts_seconds.tolist()),
        fps=float(stream.average_fps),
        total_frames=stream.num_frames,
    )
