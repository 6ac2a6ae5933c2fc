"""The numbers of a line of the training log beside the loss.

    loss/NAME            of each data set, where there are several: over its loss tokens since the last line
    samples_per_second   of all processes;  tokens_per_second  the same, media included, padding not
    fill                 tokens in the room there was: in the rectangles of padded batches, in the
                         --model_max_length of each pack.  patch_fill  patches in --pack_max_patches
    data_wait            share of the time that the slowest process waited for its batches
    tflops_vision, tflops_language    operations that the model needed, 10^12 a second and process
    mfu, mfu_vision, mfu_language     the same as a share of --peak_tflops; their sum is mfu
    memory_gib           the most that a process held: of its accelerator, or without one of its main memory

Operations needed (`qwenvl.data.flops` has those of the forward pass; the merger counts as vision): once
forward; once more where gradients flow back through a component; once more where its own weights are trained.
Operations of gradient checkpointing, of padding and of adapters' own weights do not count as needed. The time
is all of the time but evaluations and checkpoints, so both shares are of the whole step.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, TrainerCallback

from qwenvl.data.flops import MultiplyAdds
from qwenvl.train.parameters import component_of

GIB = 2**30


class TokenLosses(NamedTuple):
    """losses [B, C]: of the tokens in `columns` [C] + 1, 0 where one carries none; outputs: the model's,
    whose `logits` may be losses.
    """

    losses: torch.Tensor
    columns: torch.Tensor
    outputs: Any


class Work(NamedTuple):
    """An optimiser step over all its micro-batches; vision and language in operations that it needs.

    room: in tokens, of a padded batch; 0 of a flattened one.
    """

    loss_tokens: float
    samples: float
    tokens: float
    room: float
    patches: float
    vision: float
    language: float


def count_loss_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """What the tokens count together that a previous position predicts and that carry loss: one each, or
    their `loss_weights`.
    """
    carried = batch["labels"][:, 1:] != -100
    return (batch["loss_weights"][:, 1:] * carried).sum() if "loss_weights" in batch else carried.sum()


def samples_of_losses(batch: dict[str, Any], found: TokenLosses) -> torch.Tensor:
    """The sample that each token of `found.losses` belongs to, int64 [B, C]: its row, or its segment."""
    rows, columns = found.losses.shape
    if "attention_mask" in batch:
        return torch.arange(rows, device=found.columns.device)[:, None].expand(rows, columns)
    borders = batch["cu_seq_lens_q"][1:].contiguous()
    return torch.searchsorted(borders, found.columns + 1, right=True)[None]


class Meter(TrainerCallback):
    """Measures since the last line of the log.

    names: of the data sets that a batch's `dataset` counts; pack_tokens, pack_patches: the room in the packs
    of a micro-batch; None where there are none. peak: 10^12 operations a second of a device; None: unknown.

    Nothing waits for the accelerator but `report`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PreTrainedConfig,
        names: list[str],
        *,
        pack_tokens: int | None,
        pack_patches: int | None,
        peak: float | None,
    ) -> None:
        self.names = names
        self.pack_tokens = pack_tokens
        self.pack_patches = pack_patches
        self.peak = peak
        self.cost = MultiplyAdds.of(config)
        self.passes = passes(model)
        self._clear()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._clear()

    def _clear(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0
        self._batches = 0
        self._work = Work(*[0.0] * len(Work._fields))
        self._losses: torch.Tensor | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for a batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block is no training: its time does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._begin += time.perf_counter() - begin

    def work(self, batch: dict[str, Any]) -> torch.Tensor:
        """The `Work` of a collated batch, float64 [7]."""
        padded = "attention_mask" in batch
        lengths = batch["attention_mask"].sum(1) if padded else batch["cu_seq_lens_q"].diff()
        carried = (batch["labels"][:, 1:] != -100).sum()
        language = 2 * self.passes["language"] * self.cost.language(lengths, carried)
        patches = vision = torch.zeros((), device=language.device)
        for kind in "image", "video":
            if (grids := batch.get(f"{kind}_grid_thw")) is not None:
                tower, merger = self.cost.vision(grids)
                vision = vision + 2 * (self.passes["vision"] * tower + self.passes["merger"] * merger)
                patches = patches + grids.prod(-1).sum()
        room = torch.full_like(vision, batch["labels"].numel() if padded else 0)
        samples = torch.full_like(vision, len(lengths))
        parts = (count_loss_tokens(batch), samples, lengths.sum(), room, patches, vision, language)
        return torch.stack([part.double() for part in parts])

    def add(self, work: Work, batches: int) -> None:
        """A step of all processes, of `batches` micro-batches in this one."""
        self._work = Work(*map(sum, zip(self._work, work, strict=True)))
        self._batches += batches

    def add_losses(self, batch: dict[str, Any], found: TokenLosses) -> None:
        """The token losses of a micro-batch, each to its data set."""
        if len(self.names) < 2:
            return
        # What modality.complete adds is of no data set and carries no loss.
        names = pad(batch["dataset"], (0, 1))[samples_of_losses(batch, found)].flatten()
        labels = batch["labels"][:, found.columns + 1]
        counted = (labels != -100).double()
        if "loss_weights" in batch:
            counted = counted * batch["loss_weights"][:, found.columns + 1]
        self.add_named(names, found.losses.flatten(), counted.flatten())

    def add_named(self, names: torch.Tensor, losses: torch.Tensor, counted: torch.Tensor) -> None:
        """Losses [n] of the data sets `names` int64 [n], and what each counts [n]."""
        if self._losses is None:
            self._losses = torch.zeros(2, len(self.names), dtype=torch.float64, device=names.device)
        self._losses.index_add_(1, names, torch.stack([losses.detach().double(), counted.double()]))

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """The numbers since the last report, the same on every process; all must ask."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        work, processes, batches = self._work, accelerator.num_processes, self._batches
        numbers = self._dataset_losses(accelerator)
        numbers["samples_per_second"] = round(work.samples / seconds, 2)
        numbers["tokens_per_second"] = round(work.tokens / seconds, 1)
        room = self.pack_tokens * batches * processes if self.pack_tokens else work.room
        if room:
            numbers["fill"] = round(work.tokens / room, 4)
        if self.pack_patches and batches:
            numbers["patch_fill"] = round(work.patches / (self.pack_patches * batches * processes), 4)
        shares = {"vision": work.vision, "language": work.language}
        rates = {tower: operations / seconds / processes / 1e12 for tower, operations in shares.items()}
        numbers |= {f"tflops_{tower}": _significant(rate) for tower, rate in rates.items()}
        if self.peak:
            numbers["mfu"] = _significant(sum(rates.values()) / self.peak)
            numbers |= {f"mfu_{tower}": _significant(rate / self.peak) for tower, rate in rates.items()}
        own = [self._waited / seconds, _memory(accelerator.device)]
        every = accelerator.gather(torch.tensor([own], dtype=torch.float64, device=accelerator.device))
        assert isinstance(every, torch.Tensor)
        waited, memory = every.amax(0).tolist()
        self._clear()
        return numbers | {"data_wait": round(waited, 4), "memory_gib": round(memory, 3)}

    def _dataset_losses(self, accelerator: Accelerator) -> dict[str, float]:
        if len(self.names) < 2:
            return {}
        own = self._losses
        if own is None:
            own = torch.zeros(2, len(self.names), dtype=torch.float64, device=accelerator.device)
        total = accelerator.reduce(own, reduction="sum")
        assert isinstance(total, torch.Tensor)
        sums, counts = total.tolist()
        return {
            f"loss/{name}": loss / count
            for name, loss, count in zip(self.names, sums, counts, strict=True)
            if count
        }


def passes(model: nn.Module) -> dict[str, int]:
    """How often a training step does each component's arithmetic: 1 to 3, as the module's text says."""
    trained, own = set(), set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.add(component_of(name))
            if "lora_" not in name:
                own.add(component_of(name))
    # Gradients flow back through a component if it, or one before it, has something to train.
    order = ("vision", "merger", "language")
    return {
        name: 1 + bool(trained & set(order[: place + 1])) + (name in own) for place, name in enumerate(order)
    }


def _memory(device: torch.device) -> float:
    """The most that this process has held, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB.


def _significant(number: float) -> float:
    return float(f"{number:.4g}")
