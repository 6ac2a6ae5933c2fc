"""Muon for the weight matrices of layers, AdamW for all else, as one optimiser.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), with steps of AdamW's size,
after Moonshot, "Muon is Scalable for LLM Training" (2025), which also has processes share the matrices.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.optim import AdamW, Muon, Optimizer

from qwenvl.train.speed import bf16_hardware

# Keller Jordan's polynomial: five times, it takes singular values from 0.001 to 1 to between 0.7 and 1.2.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Each matrix with its singular values brought near 1 by Newton-Schulz steps.

    matrices [n, rows, columns] -> the same shape and dtype; computed in bf16 where the device has it.
    Elsewhere bf16 would be emulated: on a CPU a step then took 25 times as long.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    fast = torch.bfloat16 if bf16_hardware(matrices.device.type) else torch.float32
    x = (matrices.mT if tall else matrices).to(fast)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=CUBIC, alpha=QUINTIC), x, beta=LINEAR)
    return (x.mT if tall else x).to(matrices.dtype)


class BatchedMuon(Muon):
    """PyTorch's Muon, but for three things that only cost time: bf16 where it is emulated, one matrix after
    another, and every process computing all of them.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; matrices of one shape together."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for shape, weights in alike.items():
                updates = _shared(self._momentum(weights, group), group["ns_steps"], group["eps"])
                # The root mean square of AdamW's steps is about 0.2 of their rate.
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return loss

    def _momentum(self, weights: list[torch.Tensor], group: dict[str, Any]) -> torch.Tensor:
        """The gradients' running means, one step ahead (Nesterov), stacked."""
        grads = torch.stack([weight.grad for weight in weights if weight.grad is not None])
        states = [self.state[weight] for weight in weights]
        for state, grad in zip(states, grads, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        return grads.lerp(torch.stack([state["momentum_buffer"] for state in states]), group["momentum"])


def _shared(matrices: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """`orthogonalise`, each process a share of the matrices, which all processes have."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return orthogonalise(matrices, steps, eps)
    mine = slice(distributed.get_rank(), None, distributed.get_world_size())
    whole = torch.zeros_like(matrices)
    if len(matrices[mine]):
        whole[mine] = orthogonalise(matrices[mine], steps, eps)
    distributed.all_reduce(whole)
    return whole


class MuonAndAdamW(Optimizer):
    """Groups with ``"muon": True``, matrices only, are updated by Muon, others by AdamW."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(groups, {"muon": False})
        self.parts: dict[bool, Optimizer] = {}
        if mine := self._groups(muon=True):
            self.parts[True] = BatchedMuon(mine)
        if mine := self._groups(muon=False):
            self.parts[False] = AdamW(mine, betas=betas, eps=eps, fused=True)
        self._share()

    def _groups(self, *, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] is muon]

    def _share(self) -> None:
        """One state and the same groups for all: a schedule that sets `lr` here sets it for the parts."""
        for muon, part in self.parts.items():
            part.state, part.param_groups = self.state, self._groups(muon=muon)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts.values():
            part.step()
        return loss
