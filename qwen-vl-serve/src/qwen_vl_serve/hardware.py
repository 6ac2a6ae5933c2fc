"""What this machine has to run a model on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

QUERY = ["--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    memory: float | None
    """GiB in all; None where the driver does not tell."""
    capability: float | None
    """Compute capability, 9.0 for instance; None where the driver does not tell."""


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a process started here may use, and the cores."""

    gpus: tuple[Gpu, ...] = ()
    cpus: int = 1
    problem: str = ""
    """Why GPUs may have been overlooked."""

    def __str__(self) -> str:
        if not self.gpus:
            return f"{self.cpus} CPU core{'s' * (self.cpus > 1)}, no GPU"
        first = self.gpus[0]
        memory = f" with {first.memory:.0f} GiB" if first.memory else ""
        return f"{len(self.gpus)} x {first.name}{memory}"


def find_hardware(environ: Mapping[str, str] = os.environ) -> Hardware:
    """What ``nvidia-smi`` lists and CUDA_VISIBLE_DEVICES lets through, and the cores this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return Hardware(cpus=cpus)
    try:
        done = subprocess.run([tool, *QUERY], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return Hardware(cpus=cpus, problem="nvidia-smi did not answer within 60 seconds")
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        return Hardware(cpus=cpus, problem=f"nvidia-smi says: {said[-1] if said else done.returncode}")
    return Hardware(visible_gpus(done.stdout, environ.get("CUDA_VISIBLE_DEVICES")), cpus)


def visible_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs of a listing of QUERY; ``visible``: numbers or ids with commas between, None for all."""
    known: dict[tuple[str, str], Gpu] = {}
    for line in listing.splitlines():
        if line.count(",") >= 4:
            index, uuid, *name, memory, capability = (field.strip() for field in line.split(","))
            mebibytes = _number(memory)
            gibibytes = mebibytes / 1024 if mebibytes else None
            known[index, uuid] = Gpu(", ".join(name), gibibytes, _number(capability))
    if visible is None:
        return tuple(known.values())
    chosen = []
    for wanted in (name.strip() for name in visible.split(",")):
        if wanted.startswith("MIG-"):  # a part of a GPU, which this listing does not have
            chosen.append(Gpu(wanted, None, None))
            continue
        match = [gpu for (index, uuid), gpu in known.items() if wanted and _names(wanted, index, uuid)]
        if not match:  # CUDA, too, stops at the first name it does not know
            break
        chosen += match
    return tuple(chosen)


def _names(wanted: str, index: str, uuid: str) -> bool:
    return wanted == index or (wanted.startswith("GPU-") and uuid.startswith(wanted))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None
