"""Waiting for a server until it has answered a question about a picture.

    connection refused ... /v1/models lists the model ... one token about a small picture

vLLM answers /health before the first request has gone through the processor and the vision tower, which is
where a wrong setting shows, and where the first request takes long.
"""

from __future__ import annotations

import base64
import json
import ssl
import struct
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import urlsplit

PAUSE = 0.25
"""Seconds between two tries."""
SLOWEST_ANSWER = 300.0
"""Seconds that the first answer may take; kernels are compiled then."""


class Process(Protocol):
    """What is watched while waiting, a subprocess.Popen for instance."""

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        ...


class NotReady(RuntimeError):
    """The server ended, refused the question, or took too long; the message says which."""


@dataclass(frozen=True)
class Ready:
    """A server that has answered."""

    model: str
    """The name by which it is asked."""
    seconds: float
    """How long it took from the call on."""


def wait_until_ready(
    base_url: str,
    api_key: str | None = None,
    timeout: float | None = 600.0,
    process: Process | None = None,
    *,
    picture: bool = True,
    certificate: str | None = None,
) -> Ready:
    """Wait until the server at ``base_url`` ("http://127.0.0.1:8000/v1") has answered a question.

    ``timeout`` in seconds; None waits as long as ``process`` lives. ``picture=False`` asks without one.
    ``certificate``: the file of the server's own certificate, to be trusted. Proxies are not used.

    Raises NotReady when ``process`` ends, the time is up, or the server is there and refuses.
    """
    began = time.monotonic()
    client = _Client(base_url, api_key, certificate)
    last = "nothing answers"
    while timeout is None or time.monotonic() - began < timeout:
        if process is not None and (status := process.poll()) is not None:
            raise NotReady(
                f"the server ended with status {status} before it was ready; its last lines say why"
            )
        left = SLOWEST_ANSWER if timeout is None else max(1.0, timeout - (time.monotonic() - began))
        try:
            model = client.get("/models", min(left, 10.0))["data"][0]["id"]
            client.post("/chat/completions", question(model, picture), min(left, SLOWEST_ANSWER))
        except urllib.error.HTTPError as error:
            if error.code != 503:  # a proxy before a server that is not there yet
                raise NotReady(_refusal(base_url, error)) from error
            last = f"HTTP {error.code}"
        except (OSError, HTTPException) as error:  # refused, reset, cut off, timed out
            last = str(error)
        except (ValueError, LookupError, TypeError) as error:
            raise NotReady(
                f"{base_url}: what answers there is no OpenAI-compatible endpoint: {error}"
            ) from error
        else:
            return Ready(model, time.monotonic() - began)
        time.sleep(PAUSE)
    raise NotReady(f"{base_url}: no answer within {timeout:g} seconds ({last}); wait longer with timeout=")


def question(model: str, picture: bool) -> dict[str, Any]:
    """The request: one token about one small picture."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "?"}]
    if picture:
        url = f"data:image/png;base64,{base64.b64encode(small_png()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1}


def small_png() -> bytes:
    """64 x 64 gray pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * 64) * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _refusal(base_url: str, error: urllib.error.HTTPError) -> str:
    said = error.read(2000).decode(errors="replace").strip()
    remedy = "; give the server's --api-key" if error.code in (401, 403) else ""
    return f"{base_url}: the server is up, but answers HTTP {error.code}: {said}{remedy}"


class _Client:
    """JSON over HTTP with the standard library, so that waiting needs no package and no model library."""

    def __init__(self, base_url: str, api_key: str | None, certificate: str | None) -> None:
        self._base = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        handlers: list[Any] = [urllib.request.ProxyHandler({})]
        if urlsplit(base_url).scheme == "https":
            context = ssl.create_default_context(cafile=certificate)
            if certificate:  # known by the file itself, whatever name it bears
                context.check_hostname = False
                context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str, timeout: float) -> Any:
        return self._send(urllib.request.Request(self._base + path, headers=self._headers), timeout)

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        data = json.dumps(body).encode()
        return self._send(urllib.request.Request(self._base + path, data, self._headers), timeout)

    def _send(self, request: urllib.request.Request, timeout: float) -> Any:
        with self._opener.open(request, timeout=timeout) as response:
            return json.load(response)
