"""A chat as a page keeps it: turns of text and files, to the messages of a back end and to training rows.

    Turn(role, text, files) ... --to_messages, Limits--> [{"role", "content"}, ...] --backend.stream--> events
                                --training_row---------> {"image", "video", "conversations"}

Text of users is text: a special token written by hand is taken apart, so that nobody ends a turn or opens
another role by typing it.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_vl_serve.backends.base import Message

_SPECIAL = re.compile(r"<(?=\|[^|<>]{1,64}\|>|/?(?:think|tool_call|tool_response)>)")
_PLACEHOLDER = re.compile(r"<(?=(?:image|video)>)")
_BREAK = "<\u200b"  # A zero-width space: looks the same, and no vocabulary has it as a token.


@dataclass(frozen=True)
class Turn:
    """What one side said. ``files``: pictures and videos, by path, before the text."""

    role: Literal["user", "assistant"]
    text: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large media become: ``max_pixels`` a picture or frame, frames a second, and at most so many frames.
    None leaves it to the checkpoint's processor.
    """

    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None


def plain_text(text: str) -> str:
    """``text`` in which nothing is a special token any more: looks the same, reads as characters."""
    return _SPECIAL.sub(_BREAK, text)


def kind_of(path: str) -> Literal["image", "video"]:
    """What a file says it is by its name; whether it is, its reader finds out.

    Raises ValueError for a name that says neither.
    """
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    if kind not in ("image", "video"):
        raise ValueError(f"{Path(path).name}: neither a picture nor a video; send PNG, JPEG, WebP, MP4, ...")
    return kind


def to_messages(turns: Iterable[Turn], *, system: str = "", limits: Limits | None = None) -> list[Message]:
    """The messages that a back end answers. Raises ValueError for a file that is no picture and no video."""
    limits = limits or Limits()
    messages: list[Message] = [{"role": "system", "content": plain_text(system)}] if system else []
    for turn in turns:
        if turn.role == "assistant":
            messages.append({"role": "assistant", "content": plain_text(turn.text)})
            continue
        content = [_item(path, limits) for path in turn.files]
        if turn.text:
            content.append({"type": "text", "text": plain_text(turn.text)})
        messages.append({"role": "user", "content": content})
    return messages


def _item(path: str, limits: Limits) -> dict[str, Any]:
    kind = kind_of(path)
    options: dict[str, Any] = {"max_pixels": limits.max_pixels}
    if kind == "video":
        options |= {"fps": limits.fps, "max_frames": limits.max_frames}
    given = {name: value for name, value in options.items() if value is not None}
    return {"type": kind, kind: path, **given}


def training_row(turns: Sequence[Turn], *, system: str = "") -> dict[str, Any]:
    """The chat as a row that ``train_qwen.py`` takes; its files by name, to be laid beside it.

    Raises ValueError where nothing was answered.
    """
    answered = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answered:
        raise ValueError("there is no answer yet to train on")
    said = [{"from": "system", "value": _data_text(system)}] if system else []
    media: dict[str, list[str]] = {"image": [], "video": []}
    for turn in turns[: answered[-1] + 1]:
        if turn.role == "assistant":
            said.append({"from": "gpt", "value": _data_text(turn.text)})
            continue
        tags = ""
        for path in turn.files:
            kind = kind_of(path)
            media[kind].append(Path(path).name)
            tags += f"<{kind}>\n"
        said.append({"from": "human", "value": tags + _data_text(turn.text)})
    return {**{kind: names for kind, names in media.items() if names}, "conversations": said}


def _data_text(text: str) -> str:
    """In rows, ``<image>`` and ``<video>`` stand for media; written by a user they are text."""
    return _PLACEHOLDER.sub(_BREAK, plain_text(text))
