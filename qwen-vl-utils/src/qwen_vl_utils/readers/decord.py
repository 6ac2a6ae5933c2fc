"""Reader on decord."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import decord  # pyright: ignore[reportMissingImports]
import numpy as np

from ..errors import VideoError
from . import Header, checked

ERRORS = (decord.DECORDError, RuntimeError, IndexError, ValueError)


class _Opened:
    """See `readers.Opened`."""

    def __init__(self, source: str | bytes, threads: int):
        decord.logging.set_level(decord.logging.QUIET)
        try:
            self._video = decord.VideoReader(
                io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=threads
            )
            total, fps = len(self._video), float(self._video.get_avg_fps())
            height, width = self._video[0].shape[:2] if total else (0, 0)
        except ERRORS as error:
            raise VideoError(f"decord: {error}") from error
        self.header = checked("decord", Header(total, fps, height, width))

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        for index, second in zip(indices, self.seconds(indices), strict=True):
            try:
                yield self._video[index].asnumpy(), second
            except ERRORS as error:
                raise VideoError(f"decord: frame {index}: {error}") from error

    def seconds(self, indices: Sequence[int]) -> list[float]:
        try:
            starts = self._video.get_frame_timestamp([0, *indices])[:, 0].tolist()
        except ERRORS as error:
            raise VideoError(f"decord: {error}") from error
        return [second - starts[0] for second in starts[1:]]


@contextmanager
def opened(source: str | bytes, threads: int, max_pixels: int) -> Iterator[_Opened]:
    """See `readers.Reader`."""
    yield _Opened(source, threads)
