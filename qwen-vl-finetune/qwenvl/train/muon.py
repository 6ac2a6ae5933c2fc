"""Muon for the weight matrices of layers, AdamW for all else, as one optimiser.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).  The update is PyTorch's own
`torch.optim.Muon`, its size of steps AdamW's, after Moonshot, "Muon is Scalable for LLM Training" (2025).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAndAdamW(Optimizer):
    """Groups with ``"muon": True``, matrices only, are updated by Muon, others by AdamW."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(groups, {"muon": False})
        self.parts: dict[bool, Optimizer] = {}
        if mine := self._groups(muon=True):
            self.parts[True] = Muon(mine, adjust_lr_fn="match_rms_adamw")
        if mine := self._groups(muon=False):
            self.parts[False] = AdamW(mine, betas=betas, eps=eps)
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
