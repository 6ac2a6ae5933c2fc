"""Answers from a Qwen vision-language checkpoint, behind one small interface.

    messages -> backend (pixels by qwen_vl_utils) -> stream of text, or a batch of replies

Importing this package loads neither torch nor transformers; :func:`open_backend` does.
"""

from qwen_vl_serve.backends import open_backend
from qwen_vl_serve.backends.base import (
    GREEDY,
    Backend,
    BackendError,
    Event,
    Finished,
    Message,
    ReasoningDelta,
    Reply,
    RequestRefused,
    Sampling,
    TextDelta,
    Tool,
    ToolCall,
)

__all__ = [
    "GREEDY",
    "Backend",
    "BackendError",
    "Event",
    "Finished",
    "Message",
    "ReasoningDelta",
    "Reply",
    "RequestRefused",
    "Sampling",
    "TextDelta",
    "Tool",
    "ToolCall",
    "open_backend",
]
