"""Reader on torchvision up to 0.25, the name of 0.0.14's last resort; later releases read no videos."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torchvision

from ..errors import VideoError
from . import Header, checked, pyav


class _Opened:
    """See `readers.Opened`. torchvision decodes the whole file at once."""

    def __init__(self, path: str, read_video: Any):
        self._path = path
        try:
            self._frames, _, info = read_video(path, pts_unit="sec", output_format="THWC")
        except (RuntimeError, ValueError, OSError) as error:
            raise VideoError(f"torchvision: {error}") from error
        count, height, width, _ = self._frames.shape
        self.header = checked("torchvision", Header(count, float(info.get("video_fps") or 0), height, width))

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        for index, second in zip(indices, self.seconds(indices), strict=True):
            yield self._frames[index].numpy(), second

    def seconds(self, indices: Sequence[int]) -> list[float]:
        with pyav.opened(self._path, 1, 0) as video:  # torchvision stands on PyAV and tells no times itself
            return video.seconds(indices)


@contextmanager
def opened(source: str | bytes, threads: int, max_pixels: int) -> Iterator[_Opened]:
    """See `readers.Reader`."""
    read_video = getattr(torchvision.io, "read_video", None)
    if read_video is None:
        raise VideoError(
            f"torchvision {torchvision.__version__} has no video reader any more; install torchcodec, or set "
            "FORCE_QWENVL_VIDEO_READER=pyav"
        )
    if isinstance(source, str):
        yield _Opened(source, read_video)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "video")
        with open(path, "wb") as file:
            file.write(source)
        yield _Opened(path, read_video)
