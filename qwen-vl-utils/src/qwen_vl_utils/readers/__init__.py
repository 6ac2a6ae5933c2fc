"""Video readers behind one interface: open a file, let the caller choose frames, decode those.

    source --opened--> Header --(the caller chooses)--> indices --frames--> (pixels [h, w, 3], second) ...

A reader is a module of this folder with one context manager, `Reader.opened`, that gives an `Opened` and
raises VideoError where the decoder fails. Readers run in a decoder process (`worker`), which the parent
(`processes`) starts, asks and, when a decoder hangs, kills.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from ..errors import VideoError

if TYPE_CHECKING:
    import numpy as np

NAMES = ("torchcodec", "decord", "pyav", "torchvision")
"""Every reader, the preferred first."""

MODULES = {"torchcodec": "torchcodec", "decord": "decord", "pyav": "av", "torchvision": "torchvision"}
"""The package that each reader stands on."""


@dataclass(frozen=True)
class Header:
    """What is known of a video before its pixels are decoded."""

    total_frames: int
    fps: float
    """Average frames per second."""
    height: int
    width: int
    """Pixels of an upright frame."""


class Opened(Protocol):
    """A video that is open in a reader."""

    header: Header

    def frames(self, indices: Sequence[int]) -> "Iterator[tuple[np.ndarray, float]]":
        """Each frame of `indices` (ascending): uint8 [height, width, 3], upright, and its presentation time
        in seconds, the file's first frame being at 0."""
        ...

    def seconds(self, indices: Sequence[int]) -> list[float]:
        """The presentation times that `frames` would give, without decoding."""
        ...


class Reader(Protocol):
    """What a module of this folder offers."""

    def opened(self, source: str | bytes, threads: int, max_pixels: int) -> AbstractContextManager[Opened]:
        """Open a path or the bytes of a file. Raises VideoError.

        A reader that has to decode a frame to write its header leaves that where there are more than
        `max_pixels`.
        """
        ...


def installed(name: str) -> bool:
    """Whether the package behind reader `name` is installed (it is not imported)."""
    return importlib.util.find_spec(MODULES[name]) is not None


def load(name: str) -> ModuleType:
    """The module of reader `name`, a `Reader`. Raises VideoError where its package can't be loaded."""
    if name not in NAMES:
        raise ValueError(f"unknown video reader {name!r}; the readers are {', '.join(NAMES)}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec raises RuntimeError where FFmpeg's libraries are missing
        raise VideoError(f"video reader {name} can't be loaded: {error}") from error


def checked(name: str, header: Header) -> Header:
    """`header`, where it describes a video. Raises VideoError."""
    if header.total_frames < 1 or not 0 < header.fps < float("inf") or min(header.height, header.width) < 1:
        raise VideoError(f"{name}: no usable video stream ({header})")
    return header
