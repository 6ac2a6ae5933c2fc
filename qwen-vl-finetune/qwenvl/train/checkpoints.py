"""Which checkpoint a training goes on from.

What lies in output_dir/checkpoint-N, in the order it is written: weights, configuration, processor,
optimiser, schedule, random states, trainer_state.json.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
_INDEX = "model.safetensors.index.json"


def defect(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint folder; None where it can.

    The state file is written last, so a folder that has a whole one was written to the end; the headers of
    the weight files tell truncated ones.
    """
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except ValueError as error:
        return f"{STATE_FILE} is damaged: {error}"
    if (checkpoint / "latest").is_file():  # DeepSpeed's own format names its folder there.
        folder = checkpoint / (checkpoint / "latest").read_text().strip()
        return None if folder.is_dir() else f"{folder.name} is missing"
    if not (checkpoint / "optimizer.pt").is_file():
        return "optimizer.pt is missing"
    return _defect_of_weights(checkpoint)


def _defect_of_weights(checkpoint: Path) -> str | None:
    names = ["model.safetensors", "adapter_model.safetensors"]
    if (checkpoint / _INDEX).is_file():
        names = sorted(set(json.loads((checkpoint / _INDEX).read_text())["weight_map"].values()))
        missing = [name for name in names if not (checkpoint / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
    present = [checkpoint / name for name in names if (checkpoint / name).is_file()]
    for path in present:
        if path.stat().st_size != _promised_size(path):
            return f"{path.name} is not as long as its header says"
    return None if present else "the weights are missing"


def _promised_size(path: Path) -> int:
    """Bytes of a safetensors file, by its header: 8 bytes of length, the header, the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return -1
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


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
            raise ValueError(f"--resume_from_checkpoint {asked}: {reason}")
        return Path(asked)
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: -int(path.name.split("-")[1])):
        reason = defect(folder)
        if reason is None:
            return folder
        logger.warning("%s cannot be resumed from (%s); looking at the one before", folder, reason)
    if asked is not None:
        raise ValueError(f"--resume_from_checkpoint True: no complete checkpoint in {output_dir}")
    return None
