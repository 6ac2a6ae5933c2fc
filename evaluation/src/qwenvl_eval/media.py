"""What is kept of a question's pictures and videos: hashes, and the sizes and frames that the model sees.

Pictures are hashed by their bytes. A video of more than 64 MiB is hashed by its length and 64 stretches of
1 MiB, spread evenly: a benchmark's videos fill terabytes, and a run that goes on hashes them again.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_serve import Message
from qwen_vl_utils import MediaError, extract_vision_info
from qwen_vl_utils.images import image_size
from qwen_vl_utils.media import locate, vision_source

MIB = 2**20
STRETCHES = 64

Describe = Callable[[Sequence[Message]], list[Mapping[str, Any]]]
"""Messages -> for each picture and video what the model sees of it, in their order."""


def hash_media(messages: Sequence[Message]) -> list[Message]:
    """The messages with ``{"sha256", "pixels"}`` in place of each picture, video, or frame of a list, and
    with ``{"error"}`` in place of one that can't be read.
    """
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [_hashed(item) for item in message["content"]]}
        for message in messages
    ]


def describe_with(processor: Any) -> Describe:
    """How the checkpoint whose processor this is sees media: height and width [pixels]; of videos the
    indices of the frames, and their times [seconds].
    """
    from qwen_vl_utils import measure_media
    from qwen_vl_utils.videos import VideoSize

    # Each video that is looked into has a decoder process: no more of them at once than there are cores.
    turns = threading.BoundedSemaphore(os.cpu_count() or 1)

    def describe(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
        if not extract_vision_info(messages):
            return []
        found = []
        with turns:
            sizes = measure_media(messages, processor)
        for size in sizes:
            seen: dict[str, Any] = {"height": size.height, "width": size.width, "source": list(size.natural)}
            if isinstance(size, VideoSize):
                seen |= {
                    "frames": list(size.metadata.frames_indices),
                    "seconds": [round(float(t), 3) for t in size.metadata.timestamps],
                }
            found.append(seen)
        return found

    return describe


def _hashed(item: Mapping[str, Any]) -> Mapping[str, Any]:
    if item["type"] == "text":
        return item
    kind, source = vision_source(item)
    if isinstance(source, (list, tuple)):
        return {**item, kind: [_fingerprint(frame, "image") for frame in source]}
    return {**item, kind: _fingerprint(source, kind)}


def _fingerprint(source: Any, kind: str) -> dict[str, Any]:
    try:
        located = locate(source)
        found: dict[str, Any] = {"sha256": _sha256(located)}
        if kind == "image":
            height, width = image_size(located)
            found["pixels"] = height * width
        return found
    except MediaError as error:  # the back end will say so too; this is about one sample
        return {"error": str(error)}


def _sha256(located: bytes | Path) -> str:
    if isinstance(located, bytes):
        return hashlib.sha256(located).hexdigest()
    size = located.stat().st_size
    with located.open("rb") as file:
        if size <= STRETCHES * MIB:
            return hashlib.file_digest(file, "sha256").hexdigest()
        whole = hashlib.sha256(str(size).encode())
        for stretch in range(STRETCHES):
            file.seek((size - MIB) * stretch // (STRETCHES - 1))
            whole.update(file.read(MIB))
        return whole.hexdigest()
