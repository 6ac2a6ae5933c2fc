"""Messages as OpenAI-compatible endpoints take them, and back to items on the server.

{"type": "image", "image": P, "max_pixels": N}  ->  {"type": "image_url", "image_url": {"url": U}}
{"type": "video", "video": P, "fps": 4}         ->  {"type": "video_url", "video_url": {"url": U}}

    U    https://host/cat.png, or the file's bytes as data:image/png;base64,...
         a list of frames as data:video/jpeg;base64,FRAME,FRAME,... (each a whole JPEG or PNG file)
    #    what the item says besides, as a URL fragment: ...#fps=4&video_start=1.5

OpenAI's messages have no place for the options of one picture or video, and vLLM has one for all videos of a
request together, which only trusted clients may use. A fragment belongs to its URL, every client library
sends it, and no server but ``qwenvl-serve`` takes it for base64: it is refused there, not ignored.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

from PIL import Image

from qwen_vl_utils import PERMISSIVE, MediaError, MediaPolicy
from qwen_vl_utils.images import is_array, is_picture, open_image
from qwen_vl_utils.media import locate, scheme_of, vision_source
from qwen_vl_utils.vision_process import is_vision_item

WHOLE = ("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
WHOLE += ("resized_height", "resized_width")
REAL = ("fps", "video_start", "video_end", "sample_fps", "raw_fps")
TEXT = ("detail",)
FRAMES = "data:video/jpeg;base64,"


def endpoint_messages(messages: Sequence[Any], policy: MediaPolicy = PERMISSIVE) -> list[dict[str, Any]]:
    """Messages with their pictures and videos as URLs. Raises MediaError for a medium that can't be read."""
    result = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message = {**message, "content": [_part(item, policy) for item in content]}
        result.append(dict(message))
    return result


def _part(item: Mapping[str, Any], policy: MediaPolicy) -> dict[str, Any]:
    if not is_vision_item(item):
        return {key: value for key, value in item.items() if value is not None}
    kind, source = vision_source(item)
    inner = item.get(f"{kind}_url")
    options = {**(inner if isinstance(inner, Mapping) else {}), **item}
    url = media_url(kind, source, {name: options.get(name) for name in (*WHOLE, *REAL, *TEXT)}, policy)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def media_url(
    kind: str, source: Any, options: Mapping[str, Any] | None = None, policy: MediaPolicy = PERMISSIVE
) -> str:
    """The URL of one "image" or "video"; ``options`` that are not None become its fragment.

    An address without options stays one, for the server to fetch; everything else is sent along.
    """
    fragment = urlencode({name: value for name, value in (options or {}).items() if value is not None})
    if isinstance(source, str) and scheme_of(source) in ("http", "https") and not fragment:
        return source
    url = (
        _frames_url(source, policy) if isinstance(source, (list, tuple)) else _data_url(kind, source, policy)
    )
    return f"{url}#{fragment}" if fragment else url


def _data_url(kind: str, source: Any, policy: MediaPolicy) -> str:
    content = _bytes(source, policy)
    if kind == "video":
        return f"data:video/mp4;base64,{_base64(content)}"
    with Image.open(io.BytesIO(content)) as image:
        return f"data:{image.get_format_mimetype() or 'image/png'};base64,{_base64(content)}"


def _frames_url(frames: Sequence[Any], policy: MediaPolicy) -> str:
    return FRAMES + ",".join(_base64(_bytes(frame, policy)) for frame in frames)


def _bytes(source: Any, policy: MediaPolicy) -> bytes:
    """A file's own bytes; of a picture in memory, a PNG's."""
    if is_picture(source) or is_array(source):
        content = io.BytesIO()
        open_image(source, policy, policy.start()).save(content, "PNG", compress_level=1)
        return content.getvalue()
    located = locate(source, policy)
    return located if isinstance(located, bytes) else located.read_bytes()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def item_of(kind: str, url: str) -> dict[str, Any]:
    """The item behind a URL that :func:`media_url` made, or any other URL of a picture or video.

    Raises MediaError for an option that is unknown or no number.
    """
    url, _, fragment = url.partition("#")
    item: dict[str, Any] = {"type": kind, kind: url}
    try:
        options = parse_qsl(fragment, keep_blank_values=True, strict_parsing=bool(fragment))
    except ValueError as error:
        raise MediaError(f"the URL's fragment {fragment[:80]!r} is not name=value&name=value") from error
    if kind == "video" and url[: len(FRAMES)].lower() == FRAMES:
        item[kind] = [f"data:image/jpeg;base64,{frame}" for frame in url[len(FRAMES) :].split(",")]
    for name, value in options:
        item[name] = _option(name, value)
    return item


def _option(name: str, value: str) -> int | float | str:
    read = int if name in WHOLE else float if name in REAL else str if name in TEXT else None
    if read is None:
        known = ", ".join((*WHOLE, *REAL, *TEXT))
        raise MediaError(f"the URL's fragment has {name!r}, which is no option; the options are {known}")
    try:
        return read(value)
    except ValueError as error:
        raise MediaError(f"the URL's fragment says {name}={value!r}; give a number") from error
