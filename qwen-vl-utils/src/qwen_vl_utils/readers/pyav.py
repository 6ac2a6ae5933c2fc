"""Reader on PyAV, which carries its own FFmpeg and so works everywhere."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..errors import VideoError
from . import Header, checked

VARIABLE = 0.02
"""Where the rate that a file names is off by more, its rate varies."""


class _Key(NamedTuple):
    """Where decoding can start."""

    pts: int
    dts: int
    """What some containers are sought by; never behind `pts`."""


class _Index(NamedTuple):
    """What the packets tell without decoding."""

    pts: list[int]
    """Times of all frames, ascending."""
    keys: list[_Key]
    end: int
    """When the last frame is over."""
    reordered: bool
    """Whether the packets come in another order than their frames are shown."""


class _Opened:
    """See `readers.Opened`. The packets are scanned once, so counts and times are exact."""

    def __init__(self, container: InputContainer, stream: VideoStream, max_pixels: int):
        self._container, self._stream = container, stream
        self._index = _scan(container, stream)
        self.container, self.reordered = container.format.name, self._index.reordered
        self._frames, self._ahead = self._from(self._index.keys[0]), None
        context = stream.codec_context
        height, width = context.height, context.width
        if height * width <= max_pixels:  # the caller refuses a larger one
            # Whether the picture is turned stands in no header that PyAV shows, but in the frames.
            self._ahead = next(self._frames, None)
            if self._ahead is None:
                raise VideoError("pyav: no frame can be decoded")
            height, width = self._ahead.height, self._ahead.width
            if self._ahead.rotation % 180:
                height, width = width, height
        self.header = checked("pyav", Header(len(self._index.pts), self.rate(), height, width))

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        # AVI has no times of its own, and those that FFmpeg gives to reordered frames are not in order.
        counted = self.reordered and self.container == "avi"
        frames = self._counted(indices) if counted else map(self._at, (self._index.pts[i] for i in indices))
        last, pixels = None, None
        for frame, second in zip(frames, self.seconds(indices), strict=True):
            if pixels is None or frame is not last:
                last, pixels = frame, _upright(frame)
            yield pixels, second

    def seconds(self, indices: Sequence[int]) -> list[float]:
        pts, base = self._index.pts, self._stream.time_base or 0
        return [float((pts[index] - pts[0]) * base) for index in indices]

    def rate(self) -> float:
        """Average frames per second: what the file names, unless its times say something else."""
        pts, named = self._index.pts, float(self._stream.average_rate or 0)
        span = float((self._index.end - pts[0]) * (self._stream.time_base or 0))
        measured = len(pts) / span if span > 0 else named
        return named if named and abs(measured / named - 1) <= VARIABLE else measured

    def _from(self, key: _Key) -> Iterator[VideoFrame]:
        self._container.seek(key.dts, stream=self._stream, backward=True)
        return self._container.decode(self._stream)

    def _counted(self, indices: Sequence[int]) -> Iterator[VideoFrame]:
        """The frames of `indices` by their place among all that the decoder gives."""
        decoded = enumerate(self._from(self._index.keys[0]))
        place, frame = -1, None
        for index in indices:
            try:
                while place < index:
                    place, frame = next(decoded)
            except StopIteration:
                frame = None
            except av.error.FFmpegError as error:
                raise VideoError(f"pyav: frame {index}: {error}") from error
            if frame is None:
                raise VideoError(f"pyav: frame {index} of {len(self._index.pts)} can't be decoded")
            yield frame

    def _at(self, wanted: int) -> VideoFrame:
        """The frame shown at `wanted`. Seeks only where a key frame lies between the decoder and it."""
        keys = self._index.keys
        nearest = max(0, bisect_right(keys, wanted, key=lambda key: key.pts) - 1)
        position = None if self._ahead is None else self._ahead.pts
        on_the_way = position is not None and keys[nearest].pts <= position <= wanted
        if on_the_way and (frame := self._until(wanted)) is not None:
            return frame
        # A container may be sought inexactly and lead behind the key frame: then from the one before.
        for key in reversed(keys[: nearest + 1]):
            self._frames, self._ahead = self._from(key), None
            if (frame := self._until(wanted)) is not None:
                return frame
        raise VideoError(f"pyav: no frame can be decoded for time {wanted} * {self._stream.time_base} s")

    def _until(self, wanted: int) -> VideoFrame | None:
        """Go on decoding to the frame of time `wanted`; None where it does not come."""
        try:
            while self._ahead is None or self._ahead.pts is None or self._ahead.pts < wanted:
                self._ahead = next(self._frames)
        except StopIteration:
            self._ahead = None
        except av.error.FFmpegError as error:
            raise VideoError(f"pyav: {error}") from error
        return self._ahead if self._ahead is not None and self._ahead.pts == wanted else None


def _scan(container: InputContainer, stream: VideoStream) -> _Index:
    pts, keys, end = [], [], 0
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        pts.append(packet.pts)
        end = max(end, packet.pts + (packet.duration or 0))
        if packet.is_keyframe:
            keys.append(_Key(packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
    if not pts:
        raise VideoError("pyav: the video stream has no frames with a time")
    ascending = sorted(pts)
    return _Index(ascending, sorted(keys) or [_Key(min(pts), min(pts))], end, pts != ascending)


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
        with av.open(stream, mode="r", options=options, metadata_errors="replace") as container:
            video = next(iter(container.streams.video), None)
            if video is None or video.codec_context is None:  # pyright does not know of the second case
                raise VideoError("pyav: there is no video stream that it can decode")
            video.codec_context.thread_count = threads
            video.thread_type = "AUTO"
            yield _Opened(container, video, max_pixels)
    except av.error.FFmpegError as error:
        raise VideoError(f"pyav: {error}") from error
