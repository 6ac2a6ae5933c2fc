"""Reader on torchcodec (FFmpeg's shared libraries must be installed)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

from ..errors import VideoError
from . import Header, checked, pyav

ERRORS = (RuntimeError, ValueError, IndexError)


class _Opened:
    """See `readers.Opened`."""

    def __init__(self, source: str | bytes, threads: int):
        self._source = source
        try:
            # The whole file is scanned, without decoding, so counts and times are exact.
            self._decoder = VideoDecoder(source, num_ffmpeg_threads=threads, dimension_order="NHWC")
        except ERRORS as error:
            raise VideoError(f"torchcodec: {_reason(error)}") from error
        stream = self._decoder.metadata
        self._start = stream.begin_stream_seconds or 0.0
        self.header = checked(
            "torchcodec",
            Header(
                stream.num_frames or 0, float(stream.average_fps or 0), stream.height or 0, stream.width or 0
            ),
        )

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        last, shown = None, None
        for index in indices:
            if shown is None or index != last:
                try:
                    frame = self._decoder.get_frame_at(index)
                except ERRORS as error:
                    raise VideoError(f"torchcodec: frame {index}: {_reason(error)}") from error
                last, shown = index, (frame.data.numpy(), float(frame.pts_seconds) - self._start)
            yield shown

    def seconds(self, indices: Sequence[int]) -> list[float]:
        with pyav.opened(self._source, 1, 0) as video:  # torchcodec tells no time without decoding
            return video.seconds(indices)


def _reason(error: Exception) -> str:
    """The error without the function, the source file and the invitation to report that torchcodec adds."""
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).partition("\n")[0]).partition(" This should never")[0]


def _is_avi(source: str | bytes) -> bool:
    if isinstance(source, bytes):
        return source.startswith(b"RIFF")
    with open(source, "rb") as file:
        return file.read(4) == b"RIFF"


@contextmanager
def opened(source: str | bytes, threads: int, max_pixels: int) -> Iterator[_Opened]:
    """See `readers.Reader`."""
    if _is_avi(source):
        with pyav.opened(source, 1, 0) as packets:
            if packets.reordered:
                raise VideoError(
                    "torchcodec: it gives other frames than those asked for of AVI with B-frames"
                )
    yield _Opened(source, threads)
