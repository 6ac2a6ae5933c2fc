"""Cross-entropy through lm_head piece by piece, so that never all logits are in memory.

    hidden states [B, C, H] -> rows [N, H] -> pieces [P, H], P rows whose logits fill PIECE_BYTES
      -> logits [P, V] -> cross-entropies [P] -> joined, float32 [B, C]
    backward, piece by piece: logits once more -> their gradient [P, V]
      -> gradient of the rows [P, H]; of the weight [V, H], added up in place

A row's loss needs no other row, so pieces give what all rows give at once. They cost a third of lm_head's
operations more. Rows that fit into one piece are computed at once, and nothing of them twice.

All pieces are computed within one call of lm_head: ZeRO-3 and FSDP gather a module's weights when it is
called, and processes must call it equally often, however many rows they have. (Where lm_head has adapters
its layers are called for each piece; `adapters` puts none there.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

# Of a piece's fp32 logits: 1,766 rows at Qwen's 151,936 tokens. So many keep an accelerator's matrix units
# busy, and a pass over the weight's gradient, which each piece costs, is short beside them. The peak of a
# piece is two to three times as much.
PIECE_BYTES = 2**30


@contextmanager
def losses_for_logits(model: nn.Module, targets: torch.Tensor) -> Iterator[None]:
    """Within the block, `logits` in a model's outputs are the cross-entropies of `targets`, float32 [B, C].

    model: one with lm_head, bare or as parallel training wraps it; targets: int64 [B, C], one for each
    position of which the model is asked for logits; -100: none, its loss is 0.
    """
    head = _find_head(model)
    size = max(PIECE_BYTES // (4 * head.out_features), 1)
    forward, own = head.forward, vars(head).get("forward")

    def losses(hidden: torch.Tensor) -> torch.Tensor:
        rows, flat = hidden.flatten(0, 1), targets.flatten()
        if len(rows) <= size:
            found = _losses(forward, rows, flat)
        elif own is None and _is_plain(head):
            found = _in_pieces(rows, head.weight, flat, size)
        else:
            pieces = zip(rows.split(size), flat.split(size), strict=True)
            found = torch.cat([checkpoint(_losses, forward, *piece, use_reentrant=False) for piece in pieces])
        return found.view(targets.shape)

    head.forward = losses
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _find_head(model: Any) -> Any:
    # DistributedDataParallel does not hand on what its model has.
    while not hasattr(model, "get_output_embeddings"):
        model = model.module
    return model.get_output_embeddings()


def _is_plain(head: nn.Module) -> bool:
    """Whether logits are rows times weight and nothing else, as they are not where there are adapters."""
    return type(head).forward is nn.Linear.forward and head.bias is None


def _losses(head: Callable[..., torch.Tensor], rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """rows [P, H], targets [P] -> float32 [P]."""
    return cross_entropy(head(rows).float(), targets, ignore_index=-100, reduction="none")


def _in_pieces(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
    """rows [N, H], weight [V, H], targets [N] -> float32 [N], computed in autocast's dtype where it is on."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        rows = rows.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(rows, weight, targets, size)


class _LinearCrossEntropy(torch.autograd.Function):
    """By hand: while autograd adds up the gradients of a weight, it holds one more [V, H]."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, targets)
        ctx.size = size
        head = weight.to(rows.dtype)
        pieces = zip(rows.split(size), targets.split(size), strict=True)
        return torch.cat([_losses(lambda piece: linear(piece, head), *piece) for piece in pieces])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, targets = ctx.saved_tensors
        head = weight.to(rows.dtype)
        row_gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(rows), ctx.size):
            piece = slice(begin, begin + ctx.size)
            gradient = _logit_gradient(linear(rows[piece], head), targets[piece], upstream[piece])
            if row_gradient is not None:
                row_gradient[piece] = gradient @ head
            if weight_gradient is not None:
                _add_product(weight_gradient, gradient.T, rows[piece])
            del gradient  # Else it would be there beside the next piece's logits.
        return row_gradient, weight_gradient, None, None


def _logit_gradient(logits: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """Of the cross-entropies, times `upstream` [P]: logits [P, V] -> [P, V] of their dtype."""
    shares = logits.softmax(-1, dtype=torch.float32)
    shares[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    return shares.mul_(upstream.masked_fill(targets == -100, 0)[:, None]).to(logits.dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)  # Without a product as large as the total.
    else:
        total += left @ right  # Under autocast the sum over pieces keeps the weight's precision.
