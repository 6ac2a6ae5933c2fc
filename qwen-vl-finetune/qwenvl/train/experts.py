"""Experts of a mixture in training: the loss that balances their load, and what the log says of them.

    router logits, one [tokens, experts] a layer -> padding dropped -> probabilities, top_k chosen
      -> tokens an expert gets [layers, experts], probability it is given [layers, experts]
      -> summed over ranks -> balancing loss of the micro-batch; statistics until the next line of the log

Balancing loss of one layer: experts * sum over experts of (share of the tokens * mean probability).  It is
`top_k` where the load is even, which is the scale of the `router_aux_loss_coef` in config.json, and larger
where it is not.  The layers are averaged; the model library pools them first, so that there an expert too
busy in one layer makes up for one that idles in the next.

The loss is a statistic of a batch.  The batch here is one micro-batch over all ranks, padded or flattened:
two ranks with one sample each take the step of one rank with two.  Micro-batches are weighted by their
tokens; accumulating two of them is not the same as one twice as large.

Also here: the experts' matrix products in autocast's dtype, of which the model library's know nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from qwenvl.train.argument import TrainingArguments

Reduce = Callable[[torch.Tensor], torch.Tensor]
Router = Qwen3VLMoeTextTopKRouter | Qwen3_5MoeTopKRouter


GROUPED = "qwenvl_grouped_mm"


class _Cast:
    """Experts with their weights in another dtype."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        self._experts = experts
        self.gate_up_proj: torch.Tensor = experts.gate_up_proj.to(dtype)
        self.down_proj: torch.Tensor = experts.down_proj.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def _autocast_experts(
    experts: nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor
) -> torch.Tensor:
    """Grouped matrix products as `torch.autocast` has all others: of weights in fp32 they would be fp32, for
    which a GPU has no grouped kernel.  Source: the model library's `grouped_mm_experts_forward`.
    """
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(experts, hidden_states, *routing)
    dtype = torch.get_autocast_dtype(device)
    cast: Any = _Cast(experts, dtype)
    return grouped_mm_experts_forward(cast, hidden_states.to(dtype), *routing).to(hidden_states.dtype)


def follow_autocast(model: PreTrainedModel) -> None:
    """Have the experts of a loaded model, where it has some, compute in autocast's dtype."""
    if getattr(model.config.get_text_config(), "_experts_implementation", None) == "grouped_mm":
        ALL_EXPERTS_FUNCTIONS.register(GROUPED, _autocast_experts)
        model.set_experts_implementation(GROUPED)


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its layers; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, Router)]


def balance_coefficient(model: PreTrainedModel, args: TrainingArguments) -> float:
    """What the balancing loss counts beside the language loss.

    Without --router_aux_loss_coef: what config.json says where the routers are trained, 0 where they are
    frozen or there are none.  Raises ValueError for a coefficient that could have no effect.
    """
    asked = args.router_aux_loss_coef
    routers = find_routers(model)
    trained = any(parameter.requires_grad for router in routers for parameter in router.parameters())
    if asked is not None and asked < 0:
        raise ValueError(f"--router_aux_loss_coef {asked}: give 0 or more")
    if asked and not routers:
        raise ValueError(f"--router_aux_loss_coef {asked}: {model.config.model_type} has no experts; drop it")
    if asked and not trained:
        raise ValueError(
            f"--router_aux_loss_coef {asked}: the routers are frozen; --tune_mm_llm True without adapters "
            "trains them, or drop the flag"
        )
    if asked is None:
        asked = model.config.text_config.router_aux_loss_coef if trained else 0.0
    options = args.gradient_checkpointing_kwargs
    reentrant = isinstance(options, dict) and options.get("use_reentrant", False)
    if asked and args.gradient_checkpointing and reentrant:
        raise ValueError(
            "--gradient_checkpointing_kwargs use_reentrant: the routers' logits have no gradient under it, "
            "the balancing loss would do nothing; set it to false or pass --router_aux_loss_coef 0"
        )
    return asked


def expert_load(logits: torch.Tensor, real: torch.Tensor | None, top_k: int) -> torch.Tensor:
    """One layer's load [2, experts]: tokens that each expert gets, and the summed probability it is given.

    logits: [tokens, experts]; real: [tokens], False where a token is padding.  Only the probability has a
    gradient.
    """
    probability = logits.softmax(dim=-1, dtype=torch.float32)
    weight = torch.ones_like(probability[:, 0]) if real is None else real.to(probability.dtype)
    chosen = probability.topk(top_k, dim=-1).indices.flatten()
    tokens = torch.zeros_like(probability[0]).scatter_add_(0, chosen, weight.repeat_interleave(top_k))
    return torch.stack([tokens, weight @ probability])


class ExpertBalance:
    """The balancing loss of each micro-batch, and the statistics since the last line of the log.

    Nothing waits for the accelerator but `statistics`.
    """

    def __init__(self, model: nn.Module) -> None:
        routers = find_routers(model)
        self.top_k = routers[0].top_k
        self._logits: list[torch.Tensor] = []
        self._recording = False
        for router in routers:
            router.register_forward_hook(self._record)
        self._clear()

    def _record(self, router: nn.Module, inputs: tuple, outputs: tuple[torch.Tensor, ...]) -> None:
        # No arithmetic here: gradient checkpointing runs the layer again and must find the same operations.
        if self._recording:
            self._logits.append(outputs[0])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the routers say within the block, which is one forward pass."""
        self._logits = []
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def loss(self, batch: dict[str, torch.Tensor], step_tokens: float, reduce: Reduce) -> torch.Tensor:
        """This rank's part of the optimiser step's balancing loss; the parts of all ranks add up to it.

        batch: the recorded one, as it was collated; step_tokens: tokens of all micro-batches and ranks;
        reduce: the sum of a tensor over ranks.
        """
        padded = "attention_mask" in batch
        real = batch["attention_mask"].flatten().bool() if padded else None
        tokens = batch["input_ids"].numel()  # After them may come what modality.complete added.
        own = torch.stack([expert_load(layer[:tokens], real, self.top_k) for layer in self._logits])
        self._logits = []
        everywhere = reduce(own.detach().clone())
        given, probability = everywhere[:, 0], everywhere[:, 1]
        factor = given * given.shape[1] / (given[0].sum() / self.top_k)
        self._given = self._given + given
        self._balance = self._balance + (factor * probability).sum(dim=1).mean()
        return (factor * own[:, 1]).sum(dim=1).mean() / step_tokens

    def statistics(self) -> dict[str, float]:
        """What the log says, of all ranks' tokens since the last call; empty where there were none.

        router_balance_loss: the mean balancing loss, without its coefficient;  router_busiest: tokens of the
        busiest expert against the mean, in the worst layer;  router_entropy: of the load, 1 where it is even,
        mean of the layers;  router_unused: experts without a token, in all layers together.
        """
        if not isinstance(self._given, torch.Tensor):
            return {}
        share = self._given / self._given.sum(dim=1, keepdim=True)
        experts = share.shape[1]
        entropy = torch.special.entr(share).sum(dim=1).mean() / math.log(experts)
        tokens = self._given[0].sum() / self.top_k
        numbers = [self._balance / tokens, share.max() * experts, entropy, (share == 0).sum()]
        self._clear()
        balance, busiest, evenness, unused = torch.stack([number.float() for number in numbers]).tolist()
        return {
            "router_balance_loss": round(balance, 4),
            "router_busiest": round(busiest, 3),
            "router_entropy": round(evenness, 4),
            "router_unused": int(unused),
        }

    def _clear(self) -> None:
        self._given: torch.Tensor | int = 0
        self._balance: torch.Tensor | int = 0
