"""From generated tokens to an answer: whole characters, thinking apart, tool calls read.

token ids --TextPieces--> text, never cut inside a character
text      --AnswerParser--> ReasoningDelta | TextDelta, and at the end a Reply

The vLLM server has parsers of its own for the last step; transformers and vLLM offline share these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen_vl_serve.backends.base import FinishReason, ReasoningDelta, Reply, TextDelta, ToolCall

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"

Delta = ReasoningDelta | TextDelta
Emit = Callable[[str], Sequence[Delta]]


class TextPieces:
    """Turns token ids, one at a time, into text that is never cut inside a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._shown = 0

    def add(self, token: int) -> str:
        """The text this token completes; "" while a character is still open."""
        self.token_ids.append(token)
        text = decode(self._tokenizer, self.token_ids[self._shown :])
        if text.endswith("\ufffd"):
            return ""
        self._shown = len(self.token_ids)
        return text

    def rest(self) -> str:
        """What is left when no more tokens come: an open character becomes U+FFFD."""
        text = decode(self._tokenizer, self.token_ids[self._shown :])
        self._shown = len(self.token_ids)
        return text


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class AnswerParser:
    """Sorts generated text, piece by piece, into thinking, answer and tool calls.

    ``thinking``: the prompt ended with an open ``<think>``, so the text begins inside it. Tool calls are
    looked for where tools were offered; one whose JSON is broken stays text, as the model wrote it.
    """

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        self.reasoning = self.text = ""
        self.tool_calls: list[ToolCall] = []
        self._place = "thinking" if thinking else "start"
        self._tools = tools
        self._held = ""

    def add(self, piece: str, *, last: bool = False) -> Iterator[Delta]:
        """The events that ``piece`` completes; what may be the beginning of a mark is held back."""
        self._held += piece
        while (step := self._step(last)) is not None:
            yield from step

    def _step(self, last: bool) -> Sequence[Delta] | None:
        """One move: over a mark, or out with what can be no mark; None when more text is needed."""
        if not self._held:
            return None
        if self._place == "start":
            if THINK.startswith(self._held.lstrip()) and not last:
                return None
            opened = self._held.lstrip().startswith(THINK)
            self._held = self._held.lstrip()[len(THINK) :] if opened else self._held
            self._place = "thinking" if opened else "answer"
            return []
        if self._place == "thinking":
            return self._until(THOUGHT, "after thinking", last, self._think)
        if self._place == "after thinking":
            self._held = self._held.lstrip("\n")
            self._place = "answer" if self._held else self._place
            return [] if self._held else None
        if self._place == "calling":
            return self._call(last)
        return self._until(CALL, "calling", last, self._say) if self._tools else self._say(self._take())

    def _until(self, mark: str, then: str, last: bool, emit: Emit) -> Sequence[Delta] | None:
        before, found, after = self._held.partition(mark)
        if found:
            self._held, self._place = after, then
            return emit(before)
        keep = 0 if last else next(n for n in range(len(mark), -1, -1) if self._held.endswith(mark[:n]))
        if keep == len(self._held):
            return None
        return emit(self._take(keep))

    def _take(self, keep: int = 0) -> str:
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def _think(self, text: str) -> Sequence[Delta]:
        text = text if self.reasoning else text.lstrip("\n")
        self.reasoning += text
        return [ReasoningDelta(text)] if text else []

    def _say(self, text: str) -> Sequence[Delta]:
        self.text += text
        return [TextDelta(text)] if text else []

    def _call(self, last: bool) -> Sequence[Delta] | None:
        body, found, after = self._held.partition(CALLED)
        if not found and not last:
            return None
        self._held, self._place = after, "answer"
        if (call := read_tool_call(body)) is None:
            return self._say(CALL + body + found)
        self.tool_calls.append(call)
        return []

    def reply(self, prompt_ids: Sequence[int], token_ids: Sequence[int], ended: bool) -> Reply:
        """The finished answer; ``ended``: the model closed its turn itself."""
        reason: FinishReason = "stop" if ended else "length"
        if ended and self.tool_calls:
            reason = "tool_calls"
        return Reply(
            text=self.text,
            finish_reason=reason,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(token_ids),
            reasoning=self.reasoning,
            tool_calls=tuple(self.tool_calls),
            token_ids=tuple(token_ids),
            prompt_token_ids=tuple(prompt_ids),
        )


def read_tool_call(text: str) -> ToolCall | None:
    """``{"name": ..., "arguments": {...}}`` as a ToolCall; None where it isn't that."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call["name"], arguments)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt leaves a ``<think>`` open for the model."""
    return re.search(rf"{THINK}\s*\Z", prompt) is not None
