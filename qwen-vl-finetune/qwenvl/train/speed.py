"""What makes training fast without being asked for: what depends on the machine, and the line that says so.

    --bf16 not given                    yes where the device multiplies bf16 matrices itself
    --dataloader_num_workers not given  as many as a GPU can need; none where the CPU trains

A flag that is given always wins, and so does accelerate's own ACCELERATE_MIXED_PRECISION.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # They ask here for their defaults.
    from qwenvl.train.argument import DataArguments, TrainingArguments

# Beyond these a GPU's batches are ready before it asks for them; benchmarks/results has the rates of a core.
MOST_WORKERS = 8


def bf16_hardware(device: str) -> str | None:
    """What multiplies bf16 matrices on a type of device, for people to read.

    None: emulation does, which is slower than fp32, or nobody has tried.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return name if torch.cuda.is_bf16_supported(including_emulation=False) else None
    features = torch.cpu.get_capabilities() if device == "cpu" else {}
    return next((name for name in ("amx_bf16", "avx512_bf16") if features.get(name)), None)


def choose_bf16(device: str) -> bool:
    """Whether to compute in bf16 where no flag says so."""
    return "ACCELERATE_MIXED_PRECISION" not in os.environ and bf16_hardware(device) is not None


def choose_workers(device: str) -> int:
    """Loader processes of each training process where no flag says how many."""
    if device == "cpu":
        return 0  # They would take the cores that train.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def describe(args: TrainingArguments, data_args: DataArguments, attention: str) -> str:
    """One line: how a step is computed, and why so."""
    parts = (
        _precision(args),
        "samples end to end, no padding" if data_args.flattened() else "padded batches",
        f"attention {attention}",
        "logits only where answers are",
        "Muon, and AdamW for the rest" if args.muon else str(getattr(args.optim, "value", args.optim)),
        f"{args.dataloader_num_workers or 'no'} loader processes",
    )
    return f"speed: {'; '.join(parts)}"


def _precision(args: TrainingArguments) -> str:
    has = bf16_hardware(args.device.type)
    if args.bf16:
        return f"bf16, which {has} has" if has else "bf16 as asked"
    if args.fp16:
        return "fp16"
    return f"fp32 as asked, though {has} has bf16" if has else "fp32, no fast bf16 is known here"
