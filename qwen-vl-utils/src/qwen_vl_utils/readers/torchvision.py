"""The name of 0.0.14's last resort. torchvision 0.28 no longer reads videos; this says so."""

from pathlib import Path

import torchvision

from ..errors import VideoError
from . import Choose, Decoded


def read(source: Path | bytes, choose: Choose, threads: int) -> Decoded:
    """See `readers`. Always raises VideoError."""
    raise VideoError(
        f"torchvision {torchvision.__version__} has no video reader any more; install torchcodec, or set "
        "FORCE_QWENVL_VIDEO_READER=pyav"
    )
