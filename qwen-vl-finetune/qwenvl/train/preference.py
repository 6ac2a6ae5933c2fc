"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) over flattened batches.

    N rows with two answers -> one row of 2N segments [1, T]: chosen, rejected, chosen, ...
      -> token losses of the model, and of the reference without gradients
      -> log-probabilities of whole answers [N, 2], each
      -> margin [N] = beta * ((model - reference of the chosen) - (model - reference of the rejected))
      -> sum of -log sigmoid(margin) / pairs of the whole optimiser step, all micro-batches and ranks

The reference is the checkpoint that training starts from: with adapters the same weights without them, else a
copy of the weights that are trained.  Both run on the same batch in the same precision, so the first margin
is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from qwenvl.data.budget import DROPPING
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.metering import TokenLosses, Work, samples_of_losses
from qwenvl.train.trainer import QwenVLTrainer, token_losses


@dataclass
class PairArguments(DataArguments):
    """Which data; pairs are always laid end to end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data_flatten:
            raise ValueError("--data_flatten False: pairs are always laid end to end; leave the flag out")
        if self.data_packing:
            raise ValueError(
                "--data_packing True: a step counts pairs, not packs; leave it out, and fill the memory by "
                "--per_device_train_batch_size, which costs no padding"
            )
        if self.streaming:
            raise ValueError("--streaming True: pairs are checked before the first step; leave it out")
        if self.too_long in DROPPING:
            raise ValueError(
                f"--too_long {self.too_long}: the two samples of a pair could lose different parts, and the "
                "margin would compare answers to different questions; take fail or skip"
            )


@dataclass
class PreferenceArguments(TrainingArguments):
    """How it is trained."""

    beta: float = field(
        default=0.1,
        metadata={"help": "What a nat counts by which the model moves from the reference; larger: it stays "
                          "closer."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"--beta {self.beta}: give a number above 0")
        if self.splits_weights() and not (self.lora_enable and self.deepspeed):
            raise ValueError(
                "ZeRO-3 and FSDP split the weights over processes, and with full tuning the reference would "
                "not be; use scripts/zero2.json, or scripts/zero3.json with --lora_enable True"
            )


class PairLosses(NamedTuple):
    """Of N pairs. losses, margins [N]; model [N, 2]: log-probabilities of both answers, the chosen first;
    outputs: the model's.
    """

    losses: torch.Tensor
    margins: torch.Tensor
    model: torch.Tensor
    outputs: Any

    def sums(self) -> torch.Tensor:
        """Pairs, losses, pairs whose margin is above 0, margins, log-probabilities: float64 [6], no
        gradient.
        """
        count = torch.ones_like(self.margins)
        numbers = torch.stack([count, self.losses, self.margins > 0, self.margins, *self.model.T])
        return numbers.detach().double().sum(1)


class PreferenceTrainer(QwenVLTrainer):
    """Trains on which answer is preferred."""

    program = "train_dpo"
    arguments = (ModelArguments, PairArguments, PreferenceArguments)
    pairs = True
    measured = ("loss", "accuracy", "margin")
    logged: ClassVar[tuple[str, ...]] = (
        "reward_accuracy", "reward_margin", "logp_chosen", "logp_rejected",
    )  # fmt: skip

    def __init__(self, *, model: PreTrainedModel, args: PreferenceArguments, **kwargs) -> None:
        self._copy = None if args.lora_enable else frozen_copy(model)
        super().__init__(model=model, args=args, **kwargs)
        if self._copy is not None:
            self._copy.to(args.device)
        # The reference's forward pass is needed too.
        self.meter.passes = {component: count + 1 for component, count in self.meter.passes.items()}
        self.beta = args.beta
        self._sums: torch.Tensor | None = None

    def items(self, work: Work) -> float:
        """Pairs: a sample is one answer."""
        return work.samples / 2

    def objective(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        found = self.pair_losses(model, inputs)
        self._sums = found.sums() if self._sums is None else self._sums + found.sums()
        if len(self.meter.names) > 1:
            names = inputs["dataset"][::2]
            self.meter.add_named(names, found.losses, torch.ones_like(found.losses))
        return found.losses.sum(), found.outputs

    def pair_losses(self, model: nn.Module, inputs: dict[str, Any]) -> PairLosses:
        """The losses of a flattened batch of pairs."""
        # First, as nothing of it stays in memory.
        with self.reference() as reference, torch.no_grad(), self.accelerator.autocast():
            expected = answer_log_probabilities(inputs, token_losses(reference, inputs))
        found = self.trained_losses(model, inputs)
        given = answer_log_probabilities(inputs, found)
        chosen, rejected = (given - expected).T
        margins = self.beta * (chosen - rejected)
        return PairLosses(-logsigmoid(margins), margins, given, found.outputs)

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it came, within the block, without dropout."""
        if self._copy is not None:
            yield self._copy
            return
        training = self.model.training
        self.model.eval()
        with self.model.disable_adapter():
            yield self.model
        self.model.train(training)

    def measure(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return self.pair_losses(model, inputs).sums()[: 1 + len(self.measured)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the pairs since the last line say, of all processes."""
        if "loss" in logs and self._sums is not None:
            count, _, *sums = self.over_processes(self._sums).tolist()
            logs.update(
                {name: round(total / count, 6) for name, total in zip(self.logged, sums, strict=True)}
            )
            self._sums = None
        super().log(logs, start_time)


def answer_log_probabilities(batch: dict[str, Any], found: TokenLosses) -> torch.Tensor:
    """Of each whole answer, float32 [N, 2]; what `modality.complete` or an evaluation adds is no pair."""
    samples = len(batch["cu_seq_lens_q"]) - 1
    sums = found.losses.new_zeros(samples)
    sums = sums.index_add(0, samples_of_losses(batch, found)[0], -found.losses[0])
    return sums[: samples // 2 * 2].view(-1, 2)


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is, for good; what is not trained is shared with it."""
    shared = {id(each): each for each in model.parameters() if not each.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)
