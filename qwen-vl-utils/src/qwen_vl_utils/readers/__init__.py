"""Video readers behind one interface: open a file, let the caller choose frames, decode those.

    source --open--> total_frames, fps --choose--> frame indices --decode--> frames [n, 3, h, w] + seconds [n]

A reader is a module of this folder with one function
`read(source: Path | bytes, choose: Choose, threads: int) -> Decoded`, which raises VideoError where the
decoder fails and lets the exceptions of `choose` pass.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import VideoError

if TYPE_CHECKING:
    import torch

Choose = Callable[[int, float], Sequence[int]]
"""(total_frames, fps) -> the indices of the wanted frames, ascending."""

NAMES = ("torchcodec", "decord", "pyav", "torchvision")
"""Every reader, the preferred first."""

MODULES = {"torchcodec": "torchcodec", "decord": "decord", "pyav": "av", "torchvision": "torchvision"}
"""The package that each reader stands on."""


@dataclass(frozen=True)
class Decoded:
    """Frames as a reader delivers them."""

    frames: "torch.Tensor"
    """[n, 3, height, width] uint8, upright."""
    indices: tuple[int, ...]
    """Position of each frame in the file."""
    seconds: tuple[float, ...]
    """Presentation time of each frame; the file's first frame is at 0."""
    fps: float
    """Average frames per second of the file."""
    total_frames: int
    """Frames in the file."""


def installed(name: str) -> bool:
    """Whether the package behind reader `name` is installed (it is not imported)."""
    return importlib.util.find_spec(MODULES[name]) is not None


def read(name: str, source: Path | bytes, choose: Choose, threads: int) -> Decoded:
    """Decode the chosen frames of `source` with reader `name`.

    Raises VideoError where the reader can't be loaded or fails.
    """
    if name not in NAMES:
        raise ValueError(f"unknown video reader {name!r}; the readers are {', '.join(NAMES)}")
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec raises RuntimeError where FFmpeg's libraries are missing
        raise VideoError(f"video reader {name} can't be loaded: {error}") from error
    return module.read(source, choose, threads)
