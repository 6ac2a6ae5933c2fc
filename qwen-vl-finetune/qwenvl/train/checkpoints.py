"""Which checkpoint a training goes on from, and when one is whole.

    output_dir/checkpoint-N: weights, configuration, processor, optimiser, schedule, random states, state
      --all processes have written--> seal: complete.json, each file's size and SHA-256 --> older ones may go
      --started again--> defect: complete.json there, and every file as it says?  else the one before

complete.json is written last and appears at once, so whatever a kill or a full disk leaves is known for what
it is. Reading a checkpoint once more costs about a second a GiB and core; eight files are read at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

SEAL = "complete.json"
_READERS = 8
_OPTIMISER = ("optimizer", "global_step")  # The second is a folder of DeepSpeed's.


def seal(checkpoint: Path) -> None:
    """Declare a folder that all processes have written to whole: size and digest of each file in it.

    Raises OSError where the disk has no room for that either.
    """
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_READERS) as readers:
        found = dict(
            zip(names, readers.map(_fingerprint, (checkpoint / name for name in names)), strict=True)
        )
    draft = checkpoint / f"{SEAL}.draft"
    with draft.open("w") as file:
        json.dump(found, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(checkpoint / SEAL)


def unseal(checkpoint: Path) -> None:
    """Before a folder is written to: from now on it is not whole."""
    (checkpoint / SEAL).unlink(missing_ok=True)


def _fingerprint(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _is_fingerprint(entry: object) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [int, str]


def rotate(output_dir: Path, step: int, limit: int | None, best: str | None) -> None:
    """Once the checkpoint of `step` is whole: keep the last `limit` up to it, and the best.

    Folders of later steps are left from before a resume; they may be damaged, so they do not count.
    """
    numbered = {int(path.name.split("-")[1]): path for path in _folders(output_dir)}
    before = [numbered[number] for number in sorted(numbered) if number <= step]
    for folder in before[: -limit if limit and limit > 0 else 0]:
        if best is None or folder.resolve() != Path(best).resolve():
            shutil.rmtree(folder)


def _folders(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", path.name)]


def defect(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint folder; None where every file is as it was written."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        expected = json.loads((checkpoint / SEAL).read_text())
    except FileNotFoundError:
        return f"{SEAL} is missing: it was not saved to the end, or by another program"
    except ValueError as error:
        return f"{SEAL} is damaged: {error}"
    if not isinstance(expected, dict) or not all(map(_is_fingerprint, expected.values())):
        return f"{SEAL} is damaged: it is no list of files with size and digest"
    if not any(name.startswith(_OPTIMISER) for name in expected):
        return "it holds no optimiser (--save_only_model), so it is only for answering"
    for name, (size, _) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(_fingerprint, (checkpoint / name for name in expected))
        for name, fingerprint in zip(expected, found, strict=True):
            if fingerprint != expected[name]:
                return f"{name} is damaged: not the bytes that were written"
    return None


def checkpoint_to_resume(output_dir: str, asked: str | None) -> Path | None:
    """The checkpoint that training goes on from, None for a fresh start.

    asked: --resume_from_checkpoint, a folder, or "True" for the last complete one of `output_dir`, which is
    also what an absent flag finds where there is one.  Raises ValueError for a folder that cannot be used.
    """
    if asked is not None and asked.lower() == "false":
        raise ValueError(
            "--resume_from_checkpoint False: for a fresh start give an --output_dir without checkpoints"
        )
    if asked is not None and asked.lower() != "true":
        reason = defect(Path(asked))
        if reason:
            raise ValueError(f"--resume_from_checkpoint {asked}: {reason}; name another folder")
        return Path(asked)
    for folder in sorted(_folders(Path(output_dir)), key=lambda path: -int(path.name.split("-")[1])):
        reason = defect(folder)
        if reason is None:
            return folder
        logger.warning("%s cannot be resumed from (%s); looking at the one before", folder, reason)
    if asked is not None:
        raise ValueError(f"--resume_from_checkpoint True: no complete checkpoint in {output_dir}")
    return None
