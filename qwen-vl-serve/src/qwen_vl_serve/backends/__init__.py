"""Back ends: every one of them is a :class:`~qwen_vl_serve.backends.base.Backend`."""

from __future__ import annotations

from pathlib import Path

from qwen_vl_serve.backends.base import Backend
from qwen_vl_utils import PERMISSIVE, MediaPolicy


def open_backend(
    checkpoint: str | Path, *, device: str | None = None, policy: MediaPolicy = PERMISSIVE
) -> Backend:
    """Load a checkpoint and return the back end that answers with it.

    ``device``: a torch device such as ``"cpu"`` or ``"cuda:1"``; without it CUDA where there is some.
    ``policy``: what messages may fetch and cost; ``MediaPolicy.strict()`` where strangers write them.
    Raises ValueError for a folder that holds no checkpoint, OSError for a name nobody knows.
    """
    from qwen_vl_serve.backends.transformers import TransformersBackend

    return TransformersBackend.load(checkpoint, device=device, policy=policy)
