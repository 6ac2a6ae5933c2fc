"""Reader on PyAV, which carries its own FFmpeg and so works everywhere."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..errors import VideoError
from . import Header, checked


class _Opened:
    """See `readers.Opened`. The packets are scanned once, so counts and times are exact."""

    def __init__(self, container: InputContainer, stream: VideoStream, max_pixels: int):
        self._container, self._stream = container, stream
        self._pts, self._keys = _scan(container, stream)
        self._frames, self._ahead = self._from(self._keys[0]), None
        context = stream.codec_context
        height, width = context.height, context.width
        if height * width <= max_pixels:  # the caller refuses a larger one
            # Whether the picture is turned stands in no header that PyAV shows, but in the frames.
            self._ahead = next(self._frames, None)
            if self._ahead is None:
                raise VideoError("pyav: no frame can be decoded")
            sideways = self._ahead.rotation % 180 != 0
            height, width = self._ahead.height, self._ahead.width
            height, width = (width, height) if sideways else (height, width)
        fps = _fps(stream, self._pts)
        self.header = checked("pyav", Header(len(self._pts), fps, height, width))

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        last, shown = None, None
        for index, second in zip(indices, self.seconds(indices), strict=True):
            if shown is None or index != last:
                last, shown = index, (_upright(self._at(self._pts[index])), second)
            yield shown

    def seconds(self, indices: Sequence[int]) -> list[float]:
        base = self._stream.time_base or 0
        return [float((self._pts[index] - self._pts[0]) * base) for index in indices]

    def _from(self, key: int) -> Iterator[VideoFrame]:
        self._container.seek(key, stream=self._stream, backward=True)
        return self._container.decode(self._stream)

    def _at(self, wanted: int) -> VideoFrame:
        """The frame shown at `wanted`. Seeks only where a key frame lies between the decoder and it."""
        key = self._keys[max(0, bisect_right(self._keys, wanted) - 1)]
        frame, position = self._ahead, None if self._ahead is None else self._ahead.pts
        if position is None or not max(key, position) <= wanted or position < key:
            self._frames, frame = self._from(key), None
        try:
            while frame is None or frame.pts is None or frame.pts < wanted:
                frame = next(self._frames)
        except StopIteration:
            frame = None
        except av.error.FFmpegError as error:
            raise VideoError(f"pyav: {error}") from error
        self._ahead = frame
        if frame is None or frame.pts != wanted:
            raise VideoError(f"pyav: no frame can be decoded for time {wanted} * {self._stream.time_base} s")
        return frame


def _scan(container: InputContainer, stream: VideoStream) -> tuple[list[int], list[int]]:
    """(times of all frames, of those where decoding can start), ascending."""
    pts, keys = [], []
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        pts.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    if not pts:
        raise VideoError("pyav: the video stream has no frames with a time")
    return sorted(pts), sorted(keys) or [min(pts)]


def _fps(stream: VideoStream, pts: list[int]) -> float:
    if stream.average_rate:
        return float(stream.average_rate)
    span = (pts[-1] - pts[0]) * float(stream.time_base or 0)
    if not span:
        raise VideoError("pyav: the file names no frame rate and its frames no times")
    return (len(pts) - 1) / span


def _upright(frame: VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels


@contextmanager
def opened(source: str | bytes, threads: int, max_pixels: int) -> Iterator[_Opened]:
    """See `readers.Reader`."""
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    # Should a playlist come this far, it can open nothing.
    options = {"protocol_whitelist": "data" if isinstance(source, bytes) else "file"}
    try:
        with av.open(stream, mode="r", options=options) as container:
            if not container.streams.video:
                raise VideoError("pyav: there is no video stream")
            video = container.streams.video[0]
            video.codec_context.thread_count = threads
            video.thread_type = "AUTO"
            yield _Opened(container, video, max_pixels)
    except av.error.FFmpegError as error:
        raise VideoError(f"pyav: {error}") from error
