"""A program in a process of its own that may be given any text: it is ended where it takes too long.

    scoring process -- JSON lines --> the program, which imports once -- forks --> a child, which computes

The program is started, not forked, by the first request, without the environment, the working folder and the
``__main__`` of the process that asks, and kept for all later requests. Its child dies of a request that goes
over the limits, and is replaced at no cost. The limit is on computing time, so that a busy machine changes no
verdict. The program ends with the process that started it, however that ends.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_PATIENCE = 60  # seconds for an answer of any kind; reached only where the program itself hangs


class Ended(Exception):
    """The request took more time or memory than it may."""


class Sandbox:
    """The program at ``program``; several threads may ask, one is answered at a time.

    ``seconds``: computing time for one request. ``memory``: bytes of address space. ``ended`` counts the
    requests that went over either.
    """

    def __init__(self, program: Path, *, seconds: float = 1.0, memory: int = 1 << 30) -> None:
        self.ended = 0
        self._program = program
        self._limits = (str(seconds), str(memory))
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._watches_forks = False

    def ask(self, *request: Any) -> Any:
        """The program's answer to a request of JSON values.

        Raises Ended for a request that goes over the limits, and RuntimeError where the program cannot start.
        """
        with self._lock:
            reply = self._exchange(json.dumps(request))
            if "ended" in reply:
                self.ended += 1
                raise Ended(f"more than {self._limits[0]} s of computing or {self._limits[1]} bytes")
        return reply["value"]

    def close(self) -> None:
        """End the program; the next request starts it again."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.close)
        process.kill()
        process.communicate()

    def _exchange(self, request: str) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = _line(process)
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            return {"ended": True}
        return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        folders = [folder for folder in sys.path if os.path.isabs(folder)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-W", "ignore", str(self._program), *self._limits, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            encoding="ascii",
        )
        self._process = process
        atexit.register(self.close)
        if not self._watches_forks:
            os.register_at_fork(after_in_child=self._forget)
            self._watches_forks = True
        greeting = json.loads(_line(process) or '{"error": "no sign of life"}')
        if "ready" not in greeting:
            self.close()
            raise RuntimeError(f"{self._program.name} did not start: {greeting['error']}")
        return process

    def _forget(self) -> None:
        """In a forked process: the program belongs to the parent."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process and process.stdin and process.stdout:
            process.stdin.close()
            process.stdout.close()
            process.returncode = 0  # it is not ours to wait for


def _line(process: subprocess.Popen[str]) -> str:
    """The next line; "" where the program is gone or hangs."""
    assert process.stdout
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    return process.stdout.readline() if poll.poll(1000 * _PATIENCE) else ""
