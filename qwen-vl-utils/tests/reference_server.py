"""Runs the release qwen-vl-utils 0.0.14 in a process of its own; started by `conftest.py`, not by hand.

stdin: (function, args, kwargs, reader) --> stdout: (result, None | (error, text), warnings), pickled

PYTHONPATH names the folder with the release, which so takes the place of the package under test. Pixels
travel as arrays, so that neither side depends on how the other's objects pickle.
"""

import importlib.metadata
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RELEASE = "0.0.14"

# What the release lets out: its own checks, and what its libraries raise for input that it does not check.
RAISED = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def plain(value: Any) -> Any:
    """`value` with arrays in the place of pictures and tensors: ("image", ...), ("tensor", dtype, ...)."""
    if isinstance(value, Image.Image):
        return ("image", value.mode, np.asarray(value))
    if type(value).__name__ == "Tensor":
        array, dtype = value.numpy(), str(value.dtype)
        small = array.astype(np.uint8)
        return ("tensor", dtype, small if np.array_equal(small, array) else array)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value


class Records(logging.Handler):
    """Keeps the release's warnings: its fallback to torchvision hides every other error but there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def check_identity(module: Any) -> None:
    folder = Path(os.environ["PYTHONPATH"]).resolve()
    version = importlib.metadata.version("qwen-vl-utils")
    if version != RELEASE or folder not in Path(module.__file__).resolve().parents:
        raise SystemExit(f"not the release: {module.__file__} is version {version}, wanted from {folder}")


def answer(module: Any, records: Records, request: tuple[str, tuple, dict, str | None]) -> tuple:
    function, args, kwargs, reader = request
    # The release reads the environment once, when it is imported.
    module.FORCE_QWENVL_VIDEO_READER = reader
    module.get_video_reader_backend.cache_clear()
    records.messages.clear()
    try:
        result, error = plain(getattr(module, function)(*args, **kwargs)), None
    except RAISED as raised:
        result, error = None, (type(raised).__name__, str(raised))
    return result, error, list(records.messages)


def main() -> None:
    # Whatever the libraries print goes to stderr; the answers keep the real stdout for themselves.
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    from qwen_vl_utils import vision_process

    check_identity(vision_process)
    torch.set_num_threads(1)
    records = Records()
    vision_process.logger.addHandler(records)
    vision_process.logger.propagate = False
    pickle.dump(("ready", RELEASE), answers)
    answers.flush()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(answer(vision_process, records, request), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main()
