"""From an annotation row to messages.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                         {"from": "gpt", "value": "A cat."}]}
      -> read_sample -> Sample(turns, images, videos)          every rule about rows is here
      -> to_messages -> [{"role": "user", "content": [{"type": "image", "image": "/data/a.png"},
                                                      {"type": "text", "text": "\\nWhat?"}]},
                         {"role": "assistant", "content": "A cat."}]

Text is kept to the character: nothing is stripped around a placeholder, so training reads what answering
will.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip

# Marks of places that Qwen2-VL's own answers contain; special in the vocabulary, yet content.
GROUNDING_TOKENS = frozenset(
    f"<|{mark}_{side}|>" for mark in ("object_ref", "box", "quad") for side in ("start", "end")
)

_TAG = re.compile(r"(<image>|<video>)")
_URL = re.compile(r"(https?://|file://|data:)")


@dataclass(frozen=True)
class Sample:
    """One conversation: turns of (role, text), placeholders in the users' texts, and its media in order."""

    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    videos: tuple[str, ...]


def refused_text(special_tokens: list[str]) -> re.Pattern[str]:
    """A pattern of the special tokens that text of a data set must not contain: all but the marks of places.

    The template writes turns and media with them; in a text they would open turns or stand for pictures.
    """
    refused = [token for token in special_tokens if token not in GROUNDING_TOKENS]
    return re.compile("|".join(map(re.escape, sorted(refused, key=len, reverse=True))))


def is_url(path: str) -> bool:
    """Whether a media path is an address that the media reader resolves, not a path on this machine."""
    return _URL.match(path) is not None


def read_sample(row: object, data_path: str, refused: re.Pattern[str]) -> Sample:
    """Read one row of the conversation format, with media paths under `data_path`.

    Raises ValueError with the reason (the caller knows the file and the row): a field that is missing or of
    another kind, an unknown role, no answer, a placeholder outside a user's turn, counts of placeholders and
    media that differ, a special token in a text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with conversations, found {_kind(row)}")
    images, videos = _media(row, "image", data_path), _media(row, "video", data_path)
    turns = _turns(row)
    found = {"<image>": 0, "<video>": 0}
    for number, (role, text) in enumerate(turns):
        if (token := refused.search(text)) is not None:
            raise ValueError(
                f"turn {number} ({role}) contains the special token {token.group()}; take it out"
            )
        if "<image>" not in text and "<video>" not in text:
            continue
        if role != "user":
            raise ValueError(f"turn {number} ({role}) contains {_TAG.findall(text)[0]}; only user turns may")
        for tag in found:
            found[tag] += text.count(tag)
    for tag, media in (("<image>", images), ("<video>", videos)):
        if found[tag] != len(media):
            field = tag.strip("<>")
            raise ValueError(
                f"{found[tag]} {tag} placeholders for {len(media)} entries of {field!r}; make them equal"
            )
    return Sample(turns, images, videos)


def _turns(row: dict) -> tuple[tuple[str, str], ...]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"'conversations' must be a list of turns, found {_kind(conversation)}")
    turns = tuple(_turn(number, turn) for number, turn in enumerate(conversation))
    roles = [role for role, _ in turns]
    if "system" in roles[1:]:
        # Published templates drop a later system turn without a word.
        raise ValueError(f"turn {roles.index('system', 1)} is a system turn; only the first turn may be one")
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to learn; add an answer or delete the row")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        raise ValueError("the conversation begins with an answer; begin with a user turn")
    return turns


def _turn(number: int, turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} must be an object with 'from' and 'value', found {_kind(turn)}")
    who, text = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(who)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"turn {number}: {who!r} is {role!r}; known roles: {', '.join(ROLES)}")
    if not isinstance(turn.get(text), str):
        raise ValueError(f"turn {number} ({role}): {text!r} must be text, found {_kind(turn.get(text))}")
    if not turn[text].isascii():
        turn[text].encode(
            "utf-8"
        )  # Half a surrogate pair, which JSON can hold, is a UnicodeEncodeError here.
    return ROLES[role], turn[text]


def _media(row: dict, field: str, data_path: str) -> tuple[str, ...]:
    value, plural = row.get(field), row.get(f"{field}s")
    if value is not None and plural is not None:
        raise ValueError(f"both '{field}' and '{field}s'; keep one of them")
    value = plural if value is None else value
    if value is None:
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{field!r} must be a path or a list of paths, found {value!r:.80}")
    return tuple(path if is_url(path) else os.path.join(data_path, path) for path in paths)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return "an empty list" if value == [] else names.get(type(value), f"{value!r:.40}")


def to_messages(sample: Sample, *, video_options: dict) -> list[dict]:
    """Messages for the template and the media reader; `video_options` (fps, frames) go to every video."""
    images, videos = iter(sample.images), iter(sample.videos)
    messages = []
    for role, text in sample.turns:
        content: str | list[dict] = text
        if role == "user" and ("<image>" in text or "<video>" in text):
            content = []
            for part in _TAG.split(text):
                if part == "<image>":
                    content.append({"type": "image", "image": next(images)})
                elif part == "<video>":
                    content.append({"type": "video", "video": next(videos), **video_options})
                elif part:
                    content.append({"type": "text", "text": part})
        messages.append({"role": role, "content": content})
    return messages
