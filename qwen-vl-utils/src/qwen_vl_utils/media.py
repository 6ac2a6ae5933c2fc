"""Where a medium's bytes come from: a path, a URL, a data URL or the bytes themselves.

source --locate, under a policy--> pathlib.Path (an existing file, absolute) | bytes
"""

import binascii
import io
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from .errors import MediaError, MediaNotFound
from .policy import PERMISSIVE, Deadline, MediaPolicy

LONGEST_NAME = 300
"""Characters of a source in a message; base64 without its `data:` is a name of megabytes."""


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


def wants_low_detail(ele: Mapping[str, Any]) -> bool:
    """Whether an OpenAI item asks for a small picture with `detail`. Raises MediaError for an unknown one."""
    inner = ele.get("image_url")
    detail = inner.get("detail") if isinstance(inner, Mapping) else ele.get("detail")
    if detail not in (None, "auto", "high", "low"):
        raise MediaError(f"detail={detail!r} is unknown; use 'low', 'high' or 'auto'")
    return detail == "low"


def describe(source: Any) -> str:
    """A short name of `source` for messages; never the bytes of a data URL, never a URL's secrets."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, (list, tuple)):
        return f"<list of {len(source)} frames>"
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return f"<array of shape {tuple(source.shape)}, {source.dtype}>"
    text = str(source)
    if scheme_of(text) == "data":
        return f"{text[:32]}... ({len(text)} characters)"
    if scheme_of(text) in ("http", "https"):
        text = _without_secrets(text)
    return text if len(text) <= LONGEST_NAME else f"{text[:80]}... ({len(text)} characters)"


def scheme_of(source: str) -> str:
    """ "http", "https", "file" or "data" as `source` begins; "" for a path."""
    found = re.match(r"(?i)(?:(https?|file)://|(data):)", source)
    return (found[1] or found[2]).lower() if found else ""


def _without_secrets(url: str) -> str:
    """`url` without user, password and fragment, and its query as "..."."""
    shown = re.split(r"[?#]", url, maxsplit=1)
    scheme, _, rest = shown[0].partition("://")
    host, slash, path = rest.partition("/")
    query = "?..." if len(shown) > 1 and url[len(shown[0])] == "?" else ""
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{query}"


def locate(source: Any, policy: MediaPolicy = PERMISSIVE, deadline: Deadline | None = None) -> Path | bytes:
    """The file or the bytes behind `source`: a path, `file://`, `http(s)://`, `data:`, bytes, a file object.

    A path is absolute and that of a regular file; where the policy names folders, it is the real path.
    `deadline` is the clock of this medium; without one it starts now.

    Raises MediaNotFound for a missing file, MediaRefused for what `policy` does not allow, MediaTimeout, and
    MediaError for everything else that can't be had.
    """
    name = describe(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        policy.check_bytes(memoryview(source).nbytes, name)
        return bytes(source)
    if isinstance(source, io.IOBase):
        return _read(source, policy, name)
    if isinstance(source, Path):
        policy.check_scheme("file", name)
        return _existing(source, policy, name)
    if not isinstance(source, str):
        raise MediaError(
            f"unrecognised source of type {type(source).__name__}: give a path, a URL, a data URL, bytes or "
            "a file object"
        )
    scheme = scheme_of(source)
    policy.check_scheme(scheme or "file", name)
    if scheme in ("http", "https"):
        from .download import download  # requests takes longer to import than everything else here

        return download(source, name, policy, deadline or policy.start())
    if scheme == "data":
        return _decode_data_url(source, policy, name)
    return _file_url(source, policy, name) if scheme else _existing(Path(source), policy, name)


def _read(stream: io.IOBase, policy: MediaPolicy, name: str) -> bytes:
    """What a file object holds from its beginning, one byte more than allowed at most."""
    if stream.seekable():
        stream.seek(0)
    content = io.BytesIO()
    while content.tell() <= policy.max_bytes:
        # not every raw stream gives all it is asked for
        piece = stream.read(policy.max_bytes + 1 - content.tell())  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(piece, bytes):
            raise MediaError(f"{name}: reading it gave {type(piece).__name__}; open it in binary mode")
        if not piece:
            break
        content.write(piece)
    policy.check_bytes(content.tell(), name)
    return content.getvalue()


def _existing(path: Path, policy: MediaPolicy, name: str) -> Path:
    """`path` as the policy wants it. Whether a file exists outside of its folders is not told."""
    path = policy.check_path(path, name)
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise MediaNotFound(f"{name} does not exist") from error
    except (OSError, ValueError) as error:
        raise MediaNotFound(f"{name} can't be opened: {error.args[-1]}") from error
    if not stat.S_ISREG(found.st_mode):
        raise MediaNotFound(f"{name} is not a file")
    policy.check_bytes(found.st_size, name)
    return path


def _file_url(url: str, policy: MediaPolicy, name: str) -> Path:
    raw = url[len("file://") :]
    if raw.lower().startswith("localhost/"):
        raw = raw[len("localhost") :]
    # 0.0.14 took the rest literally: a name that really contains "%20" goes on working, and a relative path.
    literal = Path(raw)
    if _is_file(literal):
        return _existing(literal, policy, name)
    if not raw.startswith("/"):
        raise MediaError(
            f"{name}: a file URL names a file of this machine, not of the host {raw.partition('/')[0]!r}; "
            "write file:///folder/name"
        )
    return _existing(Path(unquote(raw)), policy, name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _base64(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # broken lines are rare, and looking for them takes as long as decoding
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)


def _decode_data_url(url: str, policy: MediaPolicy, name: str) -> bytes:
    comma = url.find(",")
    if comma < 0:
        raise MediaError(f"{name}: a data URL needs a comma before its data")
    # Before anything is copied: four characters hold at least one byte, in escaped base64 too.
    policy.check_bytes((len(url) - comma) // 4, name)
    header, body = url[:comma], url[comma + 1 :]
    if not header.lower().endswith(";base64"):
        content = unquote_to_bytes(body)
    else:
        text = unquote(body) if "%" in body else body
        try:
            content = _base64(text)
        except ValueError as error:  # binascii.Error is one, and so is a character beyond ASCII
            raise MediaError(f"{name}: broken base64: {error}") from error
    policy.check_bytes(len(content), name)
    return content
