"""The parent's side of the decoder processes: started when needed, kept for the next video, killed on time.

    session(reader, source) --request--> DecoderProcess --header, frames--> the caller

Decoders hang and crash on broken files, and a thread can't be killed. So a video is decoded in a child
process (`worker`); as many run as videos are read at once. Pixels come back through a socket, resized.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import MediaError, VideoError
from ..policy import Deadline
from . import Header
from .wire import LENGTHS, send

START_SECONDS = 300.0
"""Until a new process must have said that it runs, and that a reader's library is there; importing from a
busy network disk takes long."""
ENVIRONMENT = {
    # Decoders and resizers have threads of their own; those of numerical libraries would be in their way.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Memory of large frames is kept for the next frame instead of being fetched from the kernel again.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
VIDEOS_EACH = 500
"""Videos after which a process is replaced, whatever its decoders may have leaked."""


class Session:
    """One video, open in a decoder process."""

    def __init__(self, process: "DecoderProcess", header: Header, deadline: Deadline, name: str):
        self.header = header
        self._process, self._deadline, self._name = process, deadline, name
        self.at_rest = True
        """Whether the process waits for an order (it does not while frames are under way)."""

    def frames(self, indices: Sequence[int], out: np.ndarray) -> list[float]:
        """Decode the frames of `indices` (ascending) into `out` [n, 3, height, width], uint8 or float32,
        resized to its height and width; their times. Raises VideoError, MediaTimeout."""
        self._process.send({"indices": list(indices), "target": out.shape[2:]})
        self.at_rest = False
        seconds = []
        levels = np.empty(out.shape[1:], np.uint8)
        for frame in out:
            seconds.append(self._receive()["second"])
            into = frame if frame.dtype == np.uint8 else levels
            self._process.receive_into(into, self._deadline, self._name)
            if into is levels:
                np.copyto(frame, levels)
        self.at_rest = True
        return seconds

    def seconds(self, indices: Sequence[int]) -> list[float]:
        """The times that `frames` would give, without decoding. Raises VideoError, MediaTimeout."""
        self._process.send({"times": list(indices)})
        return self._receive()["seconds"]

    def _receive(self) -> dict[str, Any]:
        return self._process.receive(self._deadline, self._name)


@contextmanager
def session(
    reader: str, source: str | bytes, threads: int, max_pixels: int, deadline: Deadline, name: str
) -> Iterator[Session]:
    """Open `source` (a path or a file's bytes) with a reader; `name` is what errors call it.

    Raises VideoError where the reader fails or its process dies, MediaTimeout where it takes too long.
    """
    asked = time.monotonic()
    process, opened, reusable = _take(), None, False
    try:
        process.load(reader)
        # A process or reader that had to be started first is not the medium's fault.
        deadline = dataclasses.replace(deadline, ends=deadline.ends + time.monotonic() - asked)
        request = {
            "reader": reader,
            "threads": threads,
            "max_pixels": max_pixels,
            "seconds": deadline.left(name),
        }
        if isinstance(source, bytes):
            process.send({**request, "path": None}, source)
        else:
            process.send({**request, "path": source})
        opened = Session(process, Header(**process.receive(deadline, name)), deadline, name)
        yield opened
    except ReaderFailed:
        opened, reusable = None, True  # the reader gave up by itself, and waits for the next video
        raise
    finally:
        if opened is not None and opened.at_rest:
            process.send({"close": True})
            reusable = True
        _give_back(process) if reusable else process.kill()


class ReaderFailed(VideoError):
    """The reader's own message that it can't decode a video."""


class DecoderProcess:
    """One child process with `worker.main`, and the socket to it."""

    def __init__(self) -> None:
        if not sys.executable:
            raise VideoError("no decoder process can be started: sys.executable names no Python interpreter")
        ours, theirs = socket.socketpair()
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import main; main({})"
        with theirs:
            code = code.format(f"{__package__}.worker", theirs.fileno())
            self._child = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        self.pid = self._child.pid
        self._channel = ours
        self.videos = 0
        self._readers: set[str] = set()
        try:
            self.receive(_start(), "the start of a decoder process")
        except MediaError:
            self.kill()
            raise

    def load(self, reader: str) -> None:
        """Import a reader's library, once. Raises ReaderFailed where it can't be."""
        if reader not in self._readers:
            self.send({"load": reader, "seconds": START_SECONDS})
            self.receive(_start(), f"the start of the reader {reader}")
            self._readers.add(reader)

    def send(self, message: dict[str, Any], payload: bytes = b"") -> None:
        """Write one message; a dead process shows when its answer is read."""
        self._channel.settimeout(START_SECONDS)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(self._channel, message, payload)

    def receive(self, deadline: Deadline, name: str) -> dict[str, Any]:
        """The next message. Raises ReaderFailed, VideoError, MediaTimeout."""
        head = bytearray(LENGTHS.size)
        self.receive_into(head, deadline, name)
        text = bytearray(LENGTHS.unpack(head)[0])
        self.receive_into(text, deadline, name)
        message = json.loads(text)
        if "error" in message:
            raise ReaderFailed(message["error"])
        return message

    def receive_into(self, buffer: Any, deadline: Deadline, name: str) -> None:
        """Fill a buffer. Raises VideoError where the process is dead, MediaTimeout where it takes long."""
        view = memoryview(buffer).cast("B")
        while len(view):
            wait = deadline.wait(name)
            self._channel.settimeout(wait)
            try:
                count = self._channel.recv_into(view)
            except TimeoutError as error:
                raise deadline.after(wait, name) from error
            except ConnectionResetError:
                count = 0
            if not count:
                raise VideoError(f"the decoder process died ({self._end()})")
            view = view[count:]

    def _end(self) -> str:
        try:
            code = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._channel.close()
        self._child.kill()
        self._child.wait()

    def forget(self) -> None:
        """After a fork: close the child's copy of a connection that is its parent's."""
        self._channel.close()
        self._child.returncode = 0  # not ours to wait for


def _start() -> Deadline:
    return Deadline(START_SECONDS, START_SECONDS, time.monotonic() + START_SECONDS)


_lock = threading.Lock()
_idle: list[DecoderProcess] = []
_all: weakref.WeakSet[DecoderProcess] = weakref.WeakSet()
_hooked = False


def _take() -> DecoderProcess:
    global _hooked
    with _lock:
        if not _hooked:
            _hooked = True
            atexit.register(shut_down)
            os.register_at_fork(after_in_child=_forget)
        if _idle:
            return _idle.pop()
    process = DecoderProcess()
    with _lock:
        _all.add(process)
    return process


def _give_back(process: DecoderProcess) -> None:
    process.videos += 1
    with _lock:
        if process.videos < VIDEOS_EACH and len(_idle) < (os.cpu_count() or 1):
            _idle.append(process)
            return
    process.kill()


def shut_down() -> None:
    """End all decoder processes that wait; the next video starts a new one."""
    with _lock:
        while _idle:
            _idle.pop().kill()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    for process in _all:
        process.forget()
    _all.clear()
    _idle.clear()
