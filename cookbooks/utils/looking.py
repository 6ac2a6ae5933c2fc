"""Tools to think with: a closer look at a picture, a search in local texts, and the loop that offers them.

question, picture --ask--> reply: calls a tool? --zoom, search--> crop, passages --ask--> ... --> answer
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from qwen_vl_serve import Message, Reply, Tool, ToolCall
from qwen_vl_utils.grounding import RELATIVE, Box, to_pixels

from .agent_function_call import tool_calls_of

SMALLEST_SIDE = 256
"""Pixels: a crop is enlarged until its longer side has as many."""

ZOOM: Tool = {
    "type": "function",
    "function": {
        "name": "image_zoom_in_tool",
        "description": "Look closer at a part of a picture: it is cut out and enlarged.",
        "parameters": {
            "type": "object",
            "properties": {
                "bbox_2d": {
                    "type": "array",
                    "items": {"type": "number"},
                    "minItems": 4,
                    "maxItems": 4,
                    "description": "[x1, y1, x2, y2] of the part, 0 to 1000 of the picture.",
                },
                "label": {"type": "string", "description": "What is to be seen there."},
                "img_idx": {"type": "number", "description": "Which picture, from 0; crops count on."},
            },
            "required": ["bbox_2d", "label"],
        },
    },
}
SEARCH: Tool = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the texts at hand.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "A few words."}},
            "required": ["query"],
        },
    },
}


@dataclass(frozen=True)
class Passage:
    """A text that a search found: its title, what it says, and how well it fits (higher is better)."""

    title: str
    text: str
    score: float


class Corpus:
    """Texts by title, found by their words (BM25), on this machine alone."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        if not texts:
            raise ValueError("texts={} holds nothing to search")
        self._texts = dict(texts)
        self._words = {title: Counter(_words(f"{title} {text}")) for title, text in texts.items()}
        self._length = sum(words.total() for words in self._words.values()) / len(texts)

    def search(self, query: str, *, most: int = 3) -> list[Passage]:
        """At most `most` texts that share a word with `query`, best first; ties by title."""
        scores = {title: self._score(_words(query), words) for title, words in self._words.items()}
        best = sorted(
            (title for title in scores if scores[title] > 0), key=lambda title: (-scores[title], title)
        )
        return [Passage(title, self._texts[title], scores[title]) for title in best[:most]]

    def _score(self, query: Sequence[str], words: Counter[str]) -> float:
        total = 0.0
        for word in set(query):
            holding = sum(word in other for other in self._words.values())
            rare = math.log(1 + (len(self._words) - holding + 0.5) / (holding + 0.5))
            total += (
                rare * words[word] * 2.2 / (words[word] + 1.2 * (0.25 + 0.75 * words.total() / self._length))
            )
        return total


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def zoom(pictures: Sequence[Image.Image], arguments: Mapping[str, Any]) -> Image.Image:
    """The part of a picture that a call of ZOOM names, enlarged; ValueError names the field."""
    index, corners = arguments.get("img_idx", 0), arguments.get("bbox_2d")
    if isinstance(index, bool) or index not in range(len(pictures)):
        raise ValueError(f"img_idx={index!r} is no picture; there are 0 to {len(pictures) - 1}")
    if not (isinstance(corners, list) and len(corners) == 4 and all(_is_share(value) for value in corners)):
        raise ValueError(f"bbox_2d={corners!r} must be [x1, y1, x2, y2], each from 0 to {RELATIVE}")
    x1, y1, x2, y2 = corners
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"bbox_2d={corners!r} has no area; x1 < x2 and y1 < y2")
    picture = pictures[int(index)]
    box = to_pixels(Box(x1=x1, y1=y1, x2=x2, y2=y2), height=picture.height, width=picture.width)
    left, top = math.floor(box.x1), math.floor(box.y1)
    crop = picture.crop((left, top, math.ceil(box.x2), math.ceil(box.y2)))
    times = max(1, SMALLEST_SIDE / max(crop.size))
    return crop.resize((round(crop.width * times), round(crop.height * times)), Image.Resampling.BICUBIC)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= RELATIVE


@dataclass(frozen=True)
class Look:
    """One call of a tool: what was called, and what came back, a picture or a text."""

    call: ToolCall
    result: Image.Image | str


@dataclass(frozen=True)
class Thinking:
    """How an answer came about; `answered` is False where the rounds were over first."""

    answer: str
    looks: tuple[Look, ...]
    answered: bool


def think(
    question: str,
    picture: Image.Image,
    ask: Callable[[Sequence[Message]], Reply],
    corpus: Corpus,
    *,
    max_rounds: int = 6,
) -> Thinking:
    """Let a model look closer and search until it answers, or `max_rounds` replies have come.

    `ask` answers messages, with ZOOM and SEARCH offered to it. A wrong call is answered with what is wrong.
    """
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages: list[Message] = [{"role": "user", "content": content}]
    pictures, looks = [picture], []
    for _ in range(max_rounds):
        reply = ask(messages)
        calls = tool_calls_of(reply)
        if not calls:
            return Thinking(reply.text, tuple(looks), True)
        messages.append({"role": "assistant", "content": "".join(_written(call) for call in calls)})
        for call in calls:
            looks.append(Look(call, _result(call, pictures, corpus)))
        messages.append({"role": "user", "content": [_told(look.result) for look in looks[-len(calls) :]]})
    return Thinking("", tuple(looks), False)


def _result(call: ToolCall, pictures: list[Image.Image], corpus: Corpus) -> Image.Image | str:
    """What a call gives; a crop joins the pictures, so that it can be looked into in turn."""
    try:
        arguments = json.loads(call.arguments)
        if call.name == "search":
            found = corpus.search(str(arguments["query"]))
            return "\n\n".join(f"{one.title}\n{one.text}" for one in found) or "nothing was found"
        if call.name != "image_zoom_in_tool":
            return f"error: name={call.name!r} is no tool that was offered"
        pictures.append(zoom(pictures, arguments))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"error: {call.name}: {error}"
    return pictures[-1]


def _written(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'


def _told(result: Image.Image | str) -> dict[str, Any]:
    if isinstance(result, str):
        return {"type": "text", "text": f"<tool_response>\n{result}\n</tool_response>"}
    return {"type": "image", "image": result}
