"""The interface of all back ends: messages and sampling in, events or replies out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Message = dict[str, Any]
"""``{"role": ..., "content": str | [{"type": "text" | "image" | "video", ...}]}``."""

Tool = Mapping[str, Any]
"""``{"type": "function", "function": {"name", "description", "parameters"}}``, as OpenAI writes it."""

FinishReason = Literal["stop", "length", "tool_calls"]

DEFAULT_MAX_NEW_TOKENS = 512
"""Where neither the caller nor the checkpoint's generation_config names a limit."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens. What is None is left to the checkpoint's generation_config.

    ``temperature=0`` is greedy. ``seed`` makes sampling repeatable. ``json_schema`` makes the answer a JSON
    text of that schema, where the engine can (vLLM and endpoints; transformers can't and says so).
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    json_schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (1, None),
            "temperature": (0, None),
            "top_p": (0, 1),
            "top_k": (0, None),
            "repetition_penalty": (0, None),
            "presence_penalty": (-2, 2),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"Sampling.{name} is {value}; give a number that is {bounds}, or None")


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called: its name and its arguments as the JSON text it wrote."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    ``finish_reason``: "stop" (the model ended its turn), "length" (cut at max_new_tokens), "tool_calls".
    ``reasoning`` is what a thinking model wrote before its answer. ``token_ids`` are the generated ones, the
    end token included, ``prompt_token_ids`` those of the prompt with every picture's placeholders; both are
    empty where an endpoint does not tell them.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer: whole characters, never half of one."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """The next piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of a stream; ``reply.text`` and ``reply.reasoning`` are all their pieces joined."""

    reply: Reply


Event = TextDelta | ReasoningDelta | Finished


class BackendError(RuntimeError):
    """The endpoint refused a request or could not be reached; the message says which and why."""


class RequestRefused(BackendError):
    """This request will never be answered: too long, forbidden media, or what a content filter takes out."""


class Backend(Protocol):
    """Whatever answers messages.

    ``concurrent``: calls from several threads run side by side, so that many single requests are as fast as
    a batch.
    """

    @property
    def concurrent(self) -> bool: ...

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> Iterator[Event]:
        """Answer one conversation as it is made. Closing the iterator stops the generation."""
        ...

    def generate(
        self, batch: Sequence[Sequence[Message]], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> list[Reply]:
        """Answer several conversations at once, in their order."""
        ...

    def close(self) -> None:
        """Free what the back end holds: an engine's processes, connections."""
        ...
