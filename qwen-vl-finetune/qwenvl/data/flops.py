"""How much arithmetic a sample is in both towers: one table for the balance of packs and for the step log.

    language   a token through the linear layers, a sample's tokens squared through causal attention (each
               looks back only: half of the square), a token through the convolution and the recurrence of
               linear attention, a token that carries loss through lm_head
    vision     a patch through the linear layers, a frame's (or window's) patches squared through attention
    merger     a patch through the merger and the DeepStack mergers

Counted are multiply-adds of one forward pass; twice as many floating-point operations. Norms, activations,
rotary embeddings, softmax and what adapters add are left out. A token of a MoE passes through its router and
num_experts_per_tok experts, in Qwen3.5 through one more that all share. The recurrence is counted token by
token (three times a head's state); what computing it in chunks adds is left out too.  Source of the layers:
the model library's modelling code of each family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one forward pass for each unit of a sample.

    frame_square: of the layers in which a patch attends to its whole frame; window_square: of those in which
    it attends to its window, `window` merged patches wide (Qwen2.5-VL; 0 elsewhere). merge: patches a side
    that become one token.
    """

    token: float
    square: float
    logit: float
    patch: float
    frame_square: float
    window_square: float
    merger: float
    window: int
    merge: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> MultiplyAdds:
        """Of a Qwen-VL configuration."""
        text, vision = config.get_text_config().to_dict(), config.vision_config.to_dict()
        hidden, layers = text["hidden_size"], text["num_hidden_layers"]
        head = text.get("head_dim") or hidden // text["num_attention_heads"]
        queries, pairs = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
        linear = text.get("layer_types", ()).count("linear_attention")
        full = layers - linear
        # In Qwen3.5 a gate is projected with each query.
        attention = hidden * ((3 if linear else 2) * queries + 2 * pairs)
        # Qwen2-VL calls its width embed_dim and names a ratio, Qwen2.5-VL has a gated layer.
        width, depth = vision.get("embed_dim", vision["hidden_size"]), vision["depth"]
        inner = vision["intermediate_size"] if "intermediate_size" in vision else width * vision["mlp_ratio"]
        block = width * (4 * width + inner * (3 if vision["hidden_act"] == "silu" else 2))
        embed = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2 * width
        merge = vision["spatial_merge_size"]
        merged = width * merge**2
        out = vision.get("out_hidden_size", vision["hidden_size"])
        mergers = 1 + len(vision.get("deepstack_visual_indexes", ()))
        windowed = depth - len(vision["fullatt_block_indexes"]) if "fullatt_block_indexes" in vision else 0
        return cls(
            token=full * attention
            + (linear * _linear_attention(text) if linear else 0)
            + _feed_forward(config.get_text_config()),
            square=full * queries,
            logit=hidden * text["vocab_size"],
            patch=embed + depth * block,
            frame_square=2 * (depth - windowed) * width,
            window_square=2 * windowed * width,
            merger=mergers * merged * (merged + out) / merge**2,
            window=vision.get("window_size", 0) // vision["patch_size"] // merge,
            merge=merge,
        )

    def language(self, lengths: torch.Tensor, loss_tokens: torch.Tensor) -> torch.Tensor:
        """Of samples with `lengths` [n] in the language model, float64; it waits for no accelerator."""
        lengths = lengths.double()
        return self.token * lengths.sum() + self.square * (lengths**2).sum() + self.logit * loss_tokens

    def vision(self, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of media with `grids` [n, 3] in the vision tower and in its mergers, float64."""
        time, height, width = grids.double().unbind(-1)
        frame = height * width
        tower = self.patch * (time * frame).sum() + self.frame_square * (time * frame**2).sum()
        if self.window_square:
            squares = self._side_squares(height) * self._side_squares(width)
            tower = tower + self.window_square * (time * squares).sum()
        return tower, self.merger * (time * frame).sum()

    def _side_squares(self, side: torch.Tensor) -> torch.Tensor:
        """The sum of the squared lengths into which windows cut a side, in patches."""
        whole = self.window * self.merge
        rest = side % whole
        return (side - rest) * whole + rest**2


def _linear_attention(text: dict[str, Any]) -> float:
    """Of a token in one layer of linear attention (a gated delta net)."""
    heads, key, value = (
        text[f"linear_{name}"] for name in ("num_value_heads", "key_head_dim", "value_head_dim")
    )
    keys, values = text["linear_num_key_heads"] * key, heads * value
    projections = text["hidden_size"] * (2 * keys + 3 * values + 2 * heads)
    return projections + (2 * keys + values) * text["linear_conv_kernel_dim"] + 3 * heads * key * value


def _feed_forward(text: PreTrainedConfig) -> float:
    """Of a token in the feed-forward layers; in a Qwen3-VL-MoE some may be dense."""
    hidden, layers = text.hidden_size, text.num_hidden_layers
    if not (experts := getattr(text, "num_experts", 0)):
        return layers * hidden * 3 * text.intermediate_size
    chosen = text.num_experts_per_tok * 3 * text.moe_intermediate_size
    if text.model_type == "qwen3_5_moe_text":
        return layers * hidden * (chosen + experts + 3 * text.shared_expert_intermediate_size + 1)
    dense = hidden * 3 * text.intermediate_size
    sparse = sum(
        layer not in text.mlp_only_layers and (layer + 1) % text.decoder_sparse_step == 0
        for layer in range(layers)
    )
    return sparse * hidden * (chosen + experts) + (layers - sparse) * dense
