"""The decoder process: answers the requests of its parent on one socket until the parent is gone.

    {load}                      --> {ready} | {error}
    {reader, path | bytes, ...} --> {total_frames, fps, height, width} | {error}
    {indices, target}           --> {second} + pixels uint8 [3, height, width], each
    {times}                     --> {seconds}
    {close}                     --> the next request

A video that hangs or crashes its decoder takes this process with it, never the parent. Frames are resized
here: what travels is small, and neither the parent's threads nor its memory know of the large ones.
"""

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ..errors import VideoError
from ..resize import FrameResizer
from . import Opened, load
from .wire import receive, send

GRACE_SECONDS = 30
"""How long the parent may take to kill this process before it ends itself."""
RESIZERS = min(4, os.cpu_count() or 1)
"""Frames that are resized at once."""


def main(descriptor: int) -> None:
    """Serve the parent at the other end of the socket `descriptor`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with socket.socket(fileno=descriptor) as channel:
        send(channel, {"ready": True})
        while (request := receive(channel)) is not None:
            # Should the parent be killed while a decoder hangs, nobody else would end this process.
            signal.alarm(int(request[0]["seconds"]) + GRACE_SECONDS)
            try:
                if "load" in request[0]:
                    load(request[0]["load"])
                    send(channel, {"ready": True})
                else:
                    _answer(channel, *request)
            except VideoError as error:
                send(channel, {"error": str(error)})
            except BrokenPipeError:
                return
            signal.alarm(0)


def _answer(channel: socket.socket, request: dict[str, Any], payload: bytes) -> None:
    source = payload if request["path"] is None else request["path"]
    reader = load(request["reader"])
    with reader.opened(source, request["threads"], request["max_pixels"]) as video:
        header = video.header
        send(channel, {
            "total_frames": header.total_frames, "fps": header.fps,
            "height": header.height, "width": header.width,
        })  # fmt: skip
        for order in _orders(channel):
            if "times" in order:
                send(channel, {"seconds": video.seconds(order["times"])})
            else:
                _send_frames(channel, video, order["indices"], tuple(order["target"]))


def _orders(channel: socket.socket) -> Iterator[dict[str, Any]]:
    while (received := receive(channel)) is not None and "close" not in received[0]:
        yield received[0]


def _send_frames(channel: socket.socket, video: Opened, indices: list[int], target: tuple[int, int]) -> None:
    """Decode here, resize in a few threads, send in order."""
    size, buffers = (video.header.height, video.header.width), threading.local()

    def resized(pixels: np.ndarray) -> np.ndarray:
        if not hasattr(buffers, "resizer"):
            buffers.resizer = FrameResizer(size, target)
        out = torch.empty((3, *target), dtype=torch.uint8)
        buffers.resizer.into(pixels, out)
        return out.numpy()

    under_way: deque[tuple[float, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(RESIZERS) as pool:
        latest = float("-inf")
        for pixels, second in video.frames(indices):
            if second < latest:
                raise VideoError(
                    f"a frame of {second:g} s comes after one of {latest:g} s: the file's times are broken; "
                    "encode it again"
                )
            latest = second
            if pixels.shape[:2] != size:
                raise VideoError(
                    f"the picture changes its size from {size[1]} x {size[0]} to {pixels.shape[1]} x "
                    f"{pixels.shape[0]} within the video; encode it again at one size"
                )
            under_way.append((second, pool.submit(resized, pixels)))
            if len(under_way) > RESIZERS:
                _send_frame(channel, *under_way.popleft())
        for pending in under_way:
            _send_frame(channel, *pending)


def _send_frame(channel: socket.socket, second: float, pixels: Future[np.ndarray]) -> None:
    send(channel, {"second": second}, pixels.result().data)
