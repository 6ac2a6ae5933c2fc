"""The model that the notebooks ask, chosen by one variable.

MODEL=../output/mine                               a checkpoint folder; without MODEL models/qwen3-vl-nano
MODEL=http://127.0.0.1:22002/v1                    an OpenAI-compatible endpoint with one model
MODEL=https://HOST/v1#NAME  OPENAI_API_KEY=...     one of several models, hosted, by key
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from qwen_vl_serve import GREEDY, Backend, Message, Reply, Sampling, Tool, open_backend

REPOSITORY = Path(__file__).resolve().parents[2]
NANO = REPOSITORY / "models" / "qwen3-vl-nano"
T = TypeVar("T")
LONGEST_ANSWER = 256
"""Tokens; a model that never ends its turn costs no more."""


def chosen() -> str:
    """What MODEL says, or the model that comes along."""
    return os.environ.get("MODEL") or str(NANO)


def is_nano() -> bool:
    """Whether it is the model that comes along: small, and trained for little."""
    return Path(chosen()).resolve() == NANO


def lane(fast: T, full: T) -> T:
    """`fast` in the tests, `full` with `make cookbooks` (COOKBOOKS=full): how many, how long."""
    return full if os.environ.get("COOKBOOKS") == "full" else fast


def open_model() -> Backend:
    """The back end for MODEL; see :func:`qwen_vl_serve.open_backend` for what it raises."""
    address, _, name = chosen().partition("#")
    if address.startswith(("http://", "https://")):
        return open_backend(address, name=name or None)
    return open_backend(Path(chosen()).resolve(strict=True))


def ask(
    backend: Backend,
    *content: str | Image.Image | Path | dict[str, Any],
    tools: Sequence[Tool] = (),
    sampling: Sampling = GREEDY,
) -> Reply:
    """One question: texts, pictures (opened or as paths) and whole items such as videos, in their order."""
    return reply_to(
        backend, [{"role": "user", "content": [_item(part) for part in content]}], tools, sampling
    )


def reply_to(
    backend: Backend, messages: Sequence[Message], tools: Sequence[Tool] = (), sampling: Sampling = GREEDY
) -> Reply:
    """The reply to a conversation, of LONGEST_ANSWER tokens where `sampling` names no other limit."""
    limit = sampling.max_new_tokens or LONGEST_ANSWER
    (reply,) = backend.generate([messages], replace(sampling, max_new_tokens=limit), tools=tools)
    return reply


def _item(part: str | Image.Image | Path | dict[str, Any]) -> dict[str, Any]:
    if isinstance(part, dict):
        return part
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
