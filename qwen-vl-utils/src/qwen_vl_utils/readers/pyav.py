"""Reader on PyAV, which carries its own FFmpeg and so works everywhere."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.error
import numpy as np
import torch

from ..errors import VideoError
from . import Choose, Decoded

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class _Index:
    """What the packets tell without decoding: the times of all frames, and where decoding can start."""

    pts: list[int]
    keys: list[int]


def read(source: Path | bytes, choose: Choose, threads: int) -> Decoded:
    """See `readers`. The packets are scanned once, so counts and times are exact."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        with av.open(opened, mode="r") as container:
            if not container.streams.video:
                raise VideoError("pyav: there is no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = threads
            stream.thread_type = "AUTO"
            index = _scan(container, stream)
            fps = _fps(stream, index.pts)
            wanted = list(choose(len(index.pts), fps))
            frames = _decode(container, stream, index, [index.pts[i] for i in wanted])
            base = float(stream.time_base or 0)
    except av.error.FFmpegError as error:
        raise VideoError(f"pyav: {error}") from error
    return Decoded(
        frames=torch.from_numpy(frames).permute(0, 3, 1, 2),
        indices=tuple(wanted),
        seconds=tuple((index.pts[i] - index.pts[0]) * base for i in wanted),
        fps=fps,
        total_frames=len(index.pts),
    )


def _scan(container: "InputContainer", stream: "VideoStream") -> _Index:
    pts, keys = [], []
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        pts.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    if not pts:
        raise VideoError("pyav: the video stream has no frames with a time")
    return _Index(sorted(pts), sorted(keys))


def _fps(stream: "VideoStream", pts: list[int]) -> float:
    if stream.average_rate:
        return float(stream.average_rate)
    span = (pts[-1] - pts[0]) * float(stream.time_base or 0)
    if not span:
        raise VideoError("pyav: the file names no frame rate and its frames no times")
    return (len(pts) - 1) / span


def _decode(
    container: "InputContainer", stream: "VideoStream", index: _Index, wanted: Sequence[int]
) -> np.ndarray:
    """The frames shown at the times `wanted` (ascending), [n, height, width, 3] uint8.

    Seeks only where a key frame lies between the decoder and the next wanted frame.
    """
    images: dict[int, np.ndarray] = {}
    keys = np.asarray(index.keys or index.pts[:1])
    position, frames = None, iter(())
    for target in dict.fromkeys(wanted):
        key = int(keys[max(0, np.searchsorted(keys, target, side="right") - 1)])
        if position is None or key > position:
            container.seek(key, stream=stream, backward=True)
            frames = container.decode(stream)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= target), None)
        if frame is None or frame.pts != target:
            raise VideoError(f"pyav: no frame can be decoded for time {target} * {stream.time_base} s")
        position = frame.pts
        images[target] = _upright(frame)
    return np.stack([images[target] for target in wanted])


def _upright(frame: "VideoFrame") -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
