"""A batch in which nothing is to be seen gets something to see, so that every process runs the same modules.

    flattened  [1, T]  -> [1, T + 1]: one more segment, a single picture token, no loss
    padded     [B, S]  -> [B + 1, S]: one more row, a single picture token, no loss
    pixels     four patches (one merged patch), black

Processes wait for each other: plain ones for gradients, where the vision tower is trained; ZeRO-3 and FSDP at
each module, forward and backward, since each module's weights are gathered from all.  There a batch with a
video beside its pictures runs the vision tower twice, so every batch must do so, in that order.

The added token attends to itself alone and carries no loss: the step is that of the batch as it came, and
every vision parameter, DeepStack mergers included, gets its gradient, if only zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedConfig

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def complete(batch: dict[str, Any], config: PreTrainedConfig, *, each: bool) -> dict[str, Any]:
    """The batch with a picture where it has neither picture nor video; with `each`, with both kinds."""
    missing = [kind for kind, pixels in PIXELS.items() if pixels not in batch]
    if not each:
        missing = missing[:1] if len(missing) == len(PIXELS) else []
    for kind in missing:
        batch = _add(batch, kind, config)
    return batch


def _add(batch: dict[str, Any], kind: str, config: PreTrainedConfig) -> dict[str, Any]:
    vision = config.vision_config
    ids = batch["input_ids"]
    side = vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    media = {
        PIXELS[kind]: torch.zeros(side * side, width, device=ids.device),
        f"{kind}_grid_thw": torch.tensor([[1, side, side]], device=ids.device),
    }
    grow = _one_more_row if "attention_mask" in batch else _one_more_segment
    return batch | grow(batch, getattr(config, f"{kind}_token_id")) | media


def _one_more_segment(batch: dict[str, Any], token: int) -> dict[str, Any]:
    """What changes in a flattened batch."""
    borders = pad(batch["cu_seq_lens_q"], (0, 1), value=batch["input_ids"].shape[1] + 1)
    grown = {
        "input_ids": pad(batch["input_ids"], (0, 1), value=token),
        "labels": pad(batch["labels"], (0, 1), value=-100),
        "position_ids": pad(batch["position_ids"], (0, 1)),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
    }
    if "loss_weights" in batch:
        grown["loss_weights"] = pad(batch["loss_weights"], (0, 1))
    return grown


def _one_more_row(batch: dict[str, Any], token: int) -> dict[str, Any]:
    """What changes in a padded batch."""
    names = ("input_ids", "labels", "attention_mask", "position_ids", "loss_weights")
    fill = {"labels": -100}
    grown = {name: pad(batch[name], (0, 0, 0, 1), value=fill.get(name, 0)) for name in names if name in batch}
    grown["input_ids"][-1, 0] = token
    grown["attention_mask"][-1, 0] = 1
    return grown
