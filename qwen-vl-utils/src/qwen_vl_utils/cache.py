"""Decoded and resized pixels on disk, for what is read again: the next epoch, the next run, the next process.

    content, size, frames --key--> folder/ab/abcd....npz   uint8 pixels, and times of a video

The key is the content of the file, not its name, so a changed file is read anew and a moved one is not. A
file is written beside its place and moved there, so processes share a folder without locks.
"""

import hashlib
import json
import logging
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Arrays = dict[str, Any]
"""numpy arrays by name."""

VERSION = 1
"""Changes when the same key would hold other pixels."""
ROOM_EACH = 64
"""Files written between two looks at the size of the folder."""

logger = logging.getLogger(__name__)


class PixelCache:
    """A folder of pixels, of at most about `max_bytes`; what was not used for longest goes first.

    Raises ValueError for a `max_bytes` that is not positive, OSError where the folder can't be written.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 100 * 2**30):
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} must be positive: how many bytes the folder may hold")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._written = 0

    def get(self, content: Path | bytes, what: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """The arrays made of `content` for the parameters `what`, from disk, or made now and written."""
        path = self._path(content, what)
        if (found := self._read(path)) is not None:
            return found
        arrays = make()
        self._write(path, arrays)
        return arrays

    def _path(self, content: Path | bytes, what: dict[str, Any]) -> Path:
        if isinstance(content, bytes):
            digest = hashlib.sha256(content)
        else:
            with content.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        digest.update(json.dumps({**what, "version": VERSION}, sort_keys=True).encode())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.npz"

    def _read(self, path: Path) -> Arrays | None:
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s in the pixel cache is damaged (%s); it is made anew", path, error)
            return None
        return arrays

    def _write(self, path: Path, arrays: Arrays) -> None:
        import numpy as np

        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with beside.open("wb") as file:
                np.savez(file, **arrays)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        if self._written % ROOM_EACH == 0:
            self._make_room()
        self._written += 1

    def _make_room(self) -> None:
        """Delete what was not used for longest, until a tenth of the room is free."""
        files = []
        for path in self.folder.glob("??/*.npz"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(files):
            path.unlink(missing_ok=True)
            total -= size
            if total <= self.max_bytes * 0.9:
                return
