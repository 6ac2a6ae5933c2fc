"""From an annotation row to messages. Every rule about rows is here.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                         {"from": "gpt", "value": "A cat."}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                               {"type": "text", "text": "\\nWhat?"}]},
                  {"role": "assistant", "content": "A cat."}]}
      -> read_sample -> Sample(messages, weights, tools), for both of them:
                        [{"role": "user", "content": [{"type": "image", "image": "/data/a.png"},
                                                      {"type": "text", "text": "\\nWhat?"}]},
                         {"role": "assistant", "content": "A cat."}]

    {... the question last, "chosen": "A cat.", "rejected": "A dog."}
      -> split_pair -> Pair: two such rows, one with each answer, earlier answers without loss

Text is kept to the character: nothing is stripped around a placeholder, so training reads what answering
will.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip

PAIR = ("chosen", "rejected")

# Marks of places that Qwen2-VL's own answers contain; special in the vocabulary, yet content.
GROUNDING_TOKENS = frozenset(
    f"<|{mark}_{side}|>" for mark in ("object_ref", "box", "quad") for side in ("start", "end")
)

IMAGE_OPTIONS = frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width"})
VIDEO_OPTIONS = IMAGE_OPTIONS | {
    "total_pixels", "fps", "nframes", "min_frames", "max_frames", "video_start", "video_end",
    "sample_fps", "raw_fps",
}  # fmt: skip

_TAG = re.compile(r"(<image>|<video>)")
_URL = re.compile(r"(https?://|file://|data:)")


@dataclass(frozen=True)
class Sample:
    """One conversation.

    messages: for the template and the media reader, media with absolute paths. weights: what the loss of each
    assistant turn counts, in order. tools: function schemas for the template.
    """

    messages: list[dict[str, Any]]
    weights: tuple[float, ...]
    tools: list[Any] | None = None

    def media(self) -> Iterator[dict[str, Any]]:
        """The picture and video items, in order."""
        for message in self.messages:
            if isinstance(message["content"], list):
                yield from (item for item in message["content"] if item["type"] != "text")

    def files(self) -> Iterator[str]:
        """The paths of its media that lie on this machine."""
        for item in self.media():
            source = item[item["type"]]
            for path in source if isinstance(source, list) else [source]:
                if isinstance(path, str) and not is_url(path):
                    yield path


class Pair(list[dict[str, Any]]):
    """A row with two answers as two samples, the chosen one first: a packed list that stays together."""


def refused_text(special_tokens: list[str]) -> re.Pattern[str]:
    """A pattern of the special tokens that text of a data set must not contain: all but the marks of places.

    The template writes turns and media with them; in a text they would open turns or stand for pictures.
    """
    refused = [token for token in special_tokens if token not in GROUNDING_TOKENS]
    return re.compile("|".join(map(re.escape, sorted(refused, key=len, reverse=True))))


def says_something(content: str | list[dict[str, Any]]) -> bool:
    """Whether a message's content holds a word or a medium."""
    if isinstance(content, str):
        return bool(content.strip())
    return any(item["type"] != "text" or item["text"].strip() for item in content)


def is_url(path: str) -> bool:
    """Whether a media path names its bytes itself (https://, file://, data:), not a file of this machine."""
    return _URL.match(path) is not None


def read_sample(
    row: object, data_path: str, refused: re.Pattern[str], video_options: Mapping[str, float] | None = None
) -> Sample:
    """Read one row of either format, with media paths under `data_path`.

    video_options: fps, min_frames, max_frames of videos that do not say otherwise.

    Raises ValueError with the reason (the caller knows the file and the row): a field that is missing or of
    another kind, an unknown role or option, no answer, a medium outside a user's or tool's turn, counts of
    placeholders and media that differ, a special token in a text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with conversations, found {_kind(row)}")
    if any(row.get(name) is not None for name in PAIR):
        raise ValueError("a pair of answers, 'chosen' and 'rejected'; train_dpo.py trains on it")
    turns = _turns(row, _turns_field(row))
    messages = [_message(number, turn) for number, turn in enumerate(turns)]
    _check_order([message["role"] for message in messages])
    tools = _tools(row)
    for number, message in enumerate(messages):
        if (token := refused.search(_spoken(message))) is not None:
            raise ValueError(
                f"turn {number} ({message['role']}) contains the special token {token.group()}; take it out"
            )
    if tools and (token := refused.search(json.dumps(tools, ensure_ascii=False))) is not None:
        raise ValueError(f"'tools' contains the special token {token.group()}; take it out")
    sample = Sample(messages, tuple(_weights(turns, messages)), tools)
    _place_media(sample, row, data_path, video_options or {})
    return sample


def split_pair(row: object) -> Pair:
    """The conversation of a row, ended by each of its two answers; only they carry loss.

    Raises ValueError with the reason: an answer that is missing or no single turn, two that are the same, a
    conversation that ends with an answer.  All else is checked by `read_sample`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a pair must be an object with 'chosen' and 'rejected', found {_kind(row)}")
    name = _turns_field(row)
    turns = _turns(row, name)
    roles = [_role(number, turn) for number, turn in enumerate(turns)]
    if roles[-1] == "assistant":
        raise ValueError(
            "the conversation ends with an answer; end it with what 'chosen' and 'rejected' answer"
        )
    answers = [_answer(answer, row.get(answer)) for answer in PAIR]
    chosen, rejected = (_message(len(turns), answer) for answer in answers)
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same, so nothing is preferred; delete the row")
    before = [
        {**turn, "weight": 0.0} if role == "assistant" else turn
        for turn, role in zip(turns, roles, strict=True)
    ]
    shared = {key: value for key, value in row.items() if key not in PAIR}
    return Pair({**shared, name: [*before, answer]} for answer in answers)


def _answer(name: str, answer: object) -> dict:
    """One of a pair's answers as a turn."""
    if isinstance(answer, str):
        return {"role": "assistant", "content": answer}
    if not isinstance(answer, dict):
        kind = "nothing; train_qwen.py trains on answers alone" if answer is None else _kind(answer)
        raise ValueError(f"{name!r} must be text or an assistant's message, found {kind}")
    if (role := answer.get("role", answer.get("from"))) not in ("assistant", "gpt"):
        raise ValueError(f"{name!r} must be an assistant's message, found the role {role!r}")
    if answer.get("weight") is not None:
        raise ValueError(f"{name!r} has a weight; the answers of a pair count alike, take it out")
    return answer


def _turns_field(row: dict) -> str:
    return "messages" if row.get("messages") is not None else "conversations"


def _turns(row: dict, name: str) -> list[dict]:
    turns = row.get(name)
    if name == "messages" and row.get("conversations") is not None:
        raise ValueError("both 'conversations' and 'messages'; keep one of them")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name!r} must be a list of turns, found {_kind(turns)}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} must be an object with 'from' and 'value', found {_kind(turn)}")
    return turns


def _check_order(roles: list[str]) -> None:
    if "system" in roles[1:]:
        # Published templates drop a later system turn without a word.
        raise ValueError(f"turn {roles.index('system', 1)} is a system turn; only the first turn may be one")
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so nothing to learn; add an answer or delete the row")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        raise ValueError("the conversation begins with an answer; begin with a user turn")


def _role(number: int, turn: dict) -> str:
    who = "from" if "from" in turn else "role"
    role = turn.get(who)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"turn {number}: {who!r} is {role!r}; known roles: {', '.join(ROLES)}")
    return ROLES[role]


def _message(number: int, turn: dict) -> dict[str, Any]:
    """A turn as a message; a medium whose source stands in the row's columns is an item without one."""
    role, key = _role(number, turn), "value" if "from" in turn else "content"
    where = f"turn {number} ({role})"
    calls, thought = turn.get("tool_calls") or [], turn.get("reasoning_content")
    content = turn.get(key)
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = [_item(where, item) for item in content]
    elif isinstance(content, str):
        content = _split(content) if _TAG.search(content) else content
    else:
        raise ValueError(f"{where}: {key!r} must be text, found {_kind(content)}")
    if role not in ("user", "tool") and isinstance(content, list):
        if (medium := next((item["type"] for item in content if item["type"] != "text"), None)) is not None:
            raise ValueError(f"{where} contains <{medium}>; only user turns may")
        content = "".join(item["text"] for item in content)
    message: dict[str, Any] = {"role": role, "content": content}
    if (calls or thought) and role != "assistant":
        raise ValueError(f"{where} has tool_calls or reasoning_content; only assistant turns may")
    if thought is not None and not isinstance(thought, str):
        raise ValueError(f"{where}: 'reasoning_content' must be text, found {_kind(thought)}")
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [_call(where, call) for call in calls]
    return message


def _split(text: str) -> list[dict]:
    parts = (part for part in _TAG.split(text) if part)
    return [
        {"type": part[1:-1]} if _TAG.fullmatch(part) else {"type": "text", "text": part} for part in parts
    ]


def _item(where: str, item: object) -> dict:
    """One item of a content list, without the empty columns that a table adds."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: an item of 'content' must be an object, found {_kind(item)}")
    item = {key: value for key, value in item.items() if value is not None}
    kind = str(item.get("type", "")).removesuffix("_url")
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise ValueError(f"{where}: a text item needs 'text', found {_kind(item.get('text'))}")
        return {"type": "text", "text": item["text"]}
    if kind not in ("image", "video"):
        raise ValueError(f"{where}: an item of type {item.get('type')!r}; known: text, image, video")
    return {**item, "type": kind}


def _call(where: str, call: object) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{where}: a tool call must be {{"function": {{"name", "arguments"}}}}, found {_kind(call)}'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"{where}: the call of {function['name']}: its arguments are no JSON") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(row: dict) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("'tools' is text that is no JSON; give a list of function schemas") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list of function schemas, found {_kind(tools)}")
    return tools or None


def _spoken(message: dict) -> str:
    """All text of a message."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [item.get("text", "") for item in content]
    texts.append(message.get("reasoning_content", ""))
    if "tool_calls" in message:
        texts.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    for text in texts:
        text.encode("utf-8")  # Half a surrogate pair, which JSON can hold, is a UnicodeEncodeError here.
    return "\n".join(texts)


def _weights(turns: list[dict], messages: list[dict]) -> Iterator[float]:
    for number, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        weight = turn.get("weight")
        if weight is not None and message["role"] != "assistant":
            raise ValueError(f"turn {number} ({message['role']}) has a weight; only assistant turns may")
        if message["role"] == "assistant":
            weight = 1.0 if weight is None else weight
            if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise ValueError(f"turn {number} (assistant): 'weight' must be 0 or more, found {weight!r}")
            yield float(weight)


def _place_media(sample: Sample, row: dict, data_path: str, video_options: Mapping[str, float]) -> None:
    """Give every medium its source: its own, or the next of the row's column of its kind."""
    for kind in ("image", "video"):
        items = [item for item in sample.media() if item["type"] == kind]
        bare = [item for item in items if not item.keys() & {kind, f"{kind}_url"}]
        entries = _column(row, kind)
        if len(bare) != len(entries):
            raise ValueError(
                f"{len(bare)} <{kind}> placeholders for {len(entries)} entries of {kind!r}; make them equal"
            )
        for item, entry in zip(bare, entries, strict=True):
            item.update(_as_item(kind, entry))
        for item in items:
            _settle(item, kind, data_path, video_options)


def _column(row: dict, kind: str) -> list:
    value, plural = row.get(kind), row.get(f"{kind}s")
    if value is not None and plural is not None:
        raise ValueError(f"both '{kind}' and '{kind}s'; keep one of them")
    value = plural if value is None else value
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    if not all(entry and isinstance(entry, str | dict) for entry in entries):
        raise ValueError(f"{kind!r} must be a path or a list of paths, found {value!r:.80}")
    return entries


def _as_item(kind: str, entry: str | dict) -> dict:
    """An entry of a column as an item: a path, {"path", "bytes"}, or {"image": path, options}."""
    if isinstance(entry, dict):
        entry = {key: value for key, value in entry.items() if value is not None}
        if entry.keys() & {kind, f"{kind}_url"}:
            return entry
    return {kind: entry}


def _settle(item: dict, kind: str, data_path: str, video_options: Mapping[str, float]) -> None:
    """Bring an item into its one form, in place: "type", the source under its kind's name, options."""
    source = item.pop(f"{kind}_url", None) or item.pop(kind, None)
    item.pop("detail", None)
    item["type"] = kind
    known = IMAGE_OPTIONS if kind == "image" else VIDEO_OPTIONS
    for name, value in item.items():
        if name != "type" and name not in known:
            raise ValueError(f"{kind} item has the option {name!r}; known: {', '.join(sorted(known))}")
        if name != "type" and (not isinstance(value, int | float) or value < 0):
            raise ValueError(f"{kind} item: {name!r} must be a number, found {value!r:.40}")
    if item.get("video_end", float("inf")) <= item.get("video_start", 0):
        raise ValueError(f"video_end {item['video_end']} is not after video_start {item['video_start']}")
    if kind == "video" and isinstance(source, list):
        item[kind] = [_source(kind, frame, data_path) for frame in source]
        return
    item[kind] = _source(kind, source, data_path)
    if kind == "video" and "nframes" not in item:
        item.update({**video_options, **item})


def _source(kind: str, source: object, data_path: str) -> str | bytes:
    if isinstance(source, dict):
        source = next((source[key] for key in ("bytes", "path", "url") if source.get(key) is not None), None)
    if isinstance(source, bytes) and source:
        return source
    if not isinstance(source, str) or not source:
        raise ValueError(f"{kind!r} must be a path or a list of paths, found {_kind(source)}")
    return source if is_url(source) else os.path.join(data_path, source)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return "an empty list" if value == [] else names.get(type(value), f"{value!r:.40}")
