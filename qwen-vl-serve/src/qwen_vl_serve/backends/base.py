"""The interface of all back ends: messages and sampling in, text events or replies out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Message = dict[str, Any]
"""``{"role": ..., "content": str | [{"type": "text" | "image" | "video", ...}]}``."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens. What is None is left to the checkpoint's generation_config.

    ``temperature=0`` is greedy. ``seed`` makes sampling repeatable.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (1, None),
            "temperature": (0, None),
            "top_p": (0, 1),
            "top_k": (0, None),
            "repetition_penalty": (0, None),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"Sampling.{name} is {value}; give a number that is {bounds}, or None")


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Reply:
    """A finished answer. ``token_ids`` are the generated ones, the end token included.

    ``finish_reason``: "stop" (the model ended its turn) or "length" (cut at max_new_tokens).
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    token_ids: tuple[int, ...]

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer: whole characters, never half of one."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of a stream; ``reply.text`` is all pieces joined."""

    reply: Reply


Event = TextDelta | Finished


class Backend(Protocol):
    """Whatever answers messages."""

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[Event]:
        """Answer one conversation as it is made. Closing the iterator stops the generation."""
        ...

    def generate(self, batch: Sequence[Sequence[Message]], sampling: Sampling) -> list[Reply]:
        """Answer several conversations at once, in their order."""
        ...
