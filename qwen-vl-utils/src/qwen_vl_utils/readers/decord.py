"""Reader on decord."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import decord  # pyright: ignore[reportMissingImports]
import numpy as np

from ..errors import VideoError
from . import Header, Opened, checked, pyav

ERRORS = (decord.DECORDError, RuntimeError, IndexError, ValueError)
TOLERANCE = 5e-3
"""Seconds; decord keeps times as 32-bit floats."""


class _Opened:
    """See `readers.Opened`.

    decord counts frames that are not shown and tells wrong times for some containers; so count and times come
    from the packets, and a file for which decord says something else is left to another reader.
    """

    def __init__(self, source: str | bytes, threads: int, packets: Opened):
        decord.logging.set_level(decord.logging.QUIET)
        self._packets = packets
        try:
            self._video = decord.VideoReader(
                io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=threads
            )
            total = len(self._video)
            height, width = self._video[0].shape[:2] if total else (0, 0)
        except ERRORS as error:
            raise VideoError(f"decord: {error}") from error
        if total != packets.header.total_frames:
            raise VideoError(f"decord: it counts {total} frames, the file has {packets.header.total_frames}")
        self.header = checked("decord", Header(total, packets.header.fps, height, width))

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        for index, second in zip(indices, self.seconds(indices), strict=True):
            try:
                pixels = self._video[index].asnumpy()
            except ERRORS as error:
                raise VideoError(f"decord: frame {index}: {error}") from error
            if pixels.shape[2] != 3:
                raise VideoError(f"decord: it pads frames of the width {self.header.width}")
            yield pixels, second

    def seconds(self, indices: Sequence[int]) -> list[float]:
        seconds = self._packets.seconds(indices)
        try:
            first, *told = self._video.get_frame_timestamp([0, *indices])[:, 0].tolist()
        except ERRORS as error:
            raise VideoError(f"decord: {error}") from error
        for index, second, other in zip(indices, seconds, told, strict=True):
            if abs(other - first - second) > TOLERANCE:
                raise VideoError(
                    f"decord: it places frame {index} at {other - first:g} s, the file at {second:g} s"
                )
        return seconds


@contextmanager
def opened(source: str | bytes, threads: int, max_pixels: int) -> Iterator[_Opened]:
    """See `readers.Reader`."""
    with pyav.opened(source, 1, 0) as packets:
        if packets.container in ("mpeg", "mpegts") or (packets.reordered and packets.container == "avi"):
            raise VideoError(
                "decord: it gives other frames than those asked for of MPEG streams and AVI with B-frames"
            )
        yield _Opened(source, threads, packets)
