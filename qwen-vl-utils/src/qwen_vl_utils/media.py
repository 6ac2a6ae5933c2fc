"""Where a medium's bytes come from: a path, a URL, a data URL or the bytes themselves.

source --locate--> pathlib.Path (an existing file) | bytes
"""

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from .errors import MediaError, MediaNotFound

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
"""Waiting times for a server: to connect, and between two pieces of its answer."""


def vision_source(ele: Mapping[str, Any]) -> tuple[str, Any]:
    """("image" | "video", source) of one message item.

    Reads `image`, `image_url`, `video`, `video_url`; an OpenAI item's `{"url": ...}` is unwrapped.
    Raises MediaError where none of them holds a source.
    """
    for key in ("image", "image_url", "video", "video_url"):
        if (source := ele.get(key)) is not None:
            return key.removesuffix("_url"), _unwrap(key, source)
    raise MediaError(
        f"an item of type {ele.get('type')!r} has no picture or video: its keys are {sorted(ele)}; "
        "give it under 'image', 'image_url', 'video' or 'video_url'"
    )


def _unwrap(key: str, source: Any) -> Any:
    if not isinstance(source, Mapping):
        return source
    for name in ("url", "path", "bytes"):
        if source.get(name) is not None:
            return source[name]
    raise MediaError(
        f"{key!r} is a mapping with the keys {sorted(source)}; it needs 'url', 'path' or 'bytes'"
    )


def describe(source: Any) -> str:
    """A short name of `source` for messages; never the bytes of a data URL."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, str) and source.startswith("data:"):
        return f"{source[:32]}... ({len(source)} characters)"
    if isinstance(source, (list, tuple)):
        return f"<list of {len(source)} frames>"
    return str(source)


def locate(source: Any) -> Path | bytes:
    """The file or the bytes behind `source`: a path, `file://`, `http(s)://`, `data:`, bytes, a file object.

    Raises MediaNotFound for a missing file and MediaError for everything else that can't be had.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, io.IOBase):
        if source.seekable():
            source.seek(0)
        return source.read()
    if isinstance(source, Path):
        return _existing(source)
    if not isinstance(source, str):
        raise MediaError(
            f"unrecognised source of type {type(source).__name__}: give a path, a URL, a data URL, bytes or "
            "a file object"
        )
    if source.startswith(("http://", "https://")):
        return _download(source)
    if source.startswith("data:"):
        return _decode_data_url(source)
    if source.startswith("file://"):
        return _file_url(source)
    return _existing(Path(source))


def _existing(path: Path) -> Path:
    if not path.is_file():
        reason = "is not a file" if path.exists() else "does not exist"
        raise MediaNotFound(f"{path} {reason}")
    return path


def _file_url(url: str) -> Path:
    raw = url.removeprefix("file://")
    if raw.startswith("localhost/"):
        raw = raw.removeprefix("localhost")
    # 0.0.14 took the rest literally, so a name that really contains "%20" goes on working.
    literal = Path(raw)
    return literal if "%" in raw and literal.is_file() else _existing(Path(unquote(raw)))


def _decode_data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise MediaError(f"{describe(url)}: a data URL needs a comma before its data")
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote(body) if "%" in body else body)
    except binascii.Error as error:
        raise MediaError(f"{describe(url)}: broken base64: {error}") from error


def _download(url: str) -> bytes:
    import requests  # takes longer to import than everything else here

    try:
        with requests.get(url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response:
            response.raise_for_status()
            return response.content
    except requests.RequestException as error:
        raise MediaError(f"{url}: {error}") from error
