"""Several samples as one item: a packed list of an annotation file, what a flattened batch is made of.

n samples with input_ids [L_i], labels [L_i], position_ids [3, L_i], segment_lengths [1], pixels
  -> join -> one item: input_ids, labels [sum L], position_ids [3, sum L], segment_lengths [n], pixels
"""

from __future__ import annotations

import torch

# Entries that are laid end to end over samples in the order of their placeholders, where a sample has them.
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def join(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Lay items end to end. `segment_lengths` int64 [n] keeps where each sample ends."""
    if len(items) == 1:
        return items[0]
    joined = {
        key: torch.cat([item[key] for item in items]) for key in ("input_ids", "labels", "segment_lengths")
    }
    joined["position_ids"] = torch.cat([item["position_ids"] for item in items], dim=1)
    return joined | join_media(items)


def join_media(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pixels and grids of all items, for those kinds of media that any of them has."""
    found = {key: [item[key] for item in items if key in item] for key in MEDIA}
    return {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in found.items() if parts}
