"""From items to a batch: padded to one rectangle, or laid end to end in one row.

    items: input_ids [L_i], labels [L_i], position_ids [3, L_i], segment_lengths [n_i], pixels
      padded     input_ids, labels, attention_mask [B, S]; position_ids [3, B, S]; pixels
      flattened  input_ids, labels [1, T]; position_ids [4, 1, T], row 0 from 0 in every segment;
                 cu_seq_lens_q = cu_seq_lens_k int32 [n + 1]; max_length_q = max_length_k int; pixels

Pixels stay uint8 until they are on the trainer's device.

Where some answer counts differently, `loss_weights` float32 has the shape of labels.  `dataset` int64 [n]
says of each sample which data set it comes from, where the items do.

A flattened batch has no attention mask: the attention reads the borders in `cu_seq_lens_*`, and the model
library's own mask functions read them from row 0 of the positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from qwenvl.data.labels import IGNORE_INDEX
from qwenvl.data.packing import join, join_media, loss_weights

Item = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PaddedCollator:
    """Pad on the right to the longest sample of the batch."""

    pad_token_id: int

    def __call__(self, items: list[Item]) -> Item:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        positions = pad_sequence([item["position_ids"].T for item in items], batch_first=True)  # [B, S, 3]
        batch = {
            "input_ids": _pad([item["input_ids"] for item in items], self.pad_token_id),
            "labels": _pad([item["labels"] for item in items], IGNORE_INDEX),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "position_ids": positions.permute(2, 0, 1).contiguous(),
        }
        if any("loss_weights" in item for item in items):
            batch["loss_weights"] = _pad([loss_weights(item) for item in items], 0.0)
        if all("dataset" in item for item in items):
            batch["dataset"] = torch.cat([item["dataset"] for item in items])
        return batch | join_media(items)


@dataclass(frozen=True)
class FlattenedCollator:
    """Lay all samples of the batch, those of packed items too, end to end without padding."""

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor | int]:
        row = join(items)
        lengths = row["segment_lengths"]
        ends = lengths.cumsum(0)
        starts = ends - lengths
        total = len(row["input_ids"])
        labels = row["labels"].clone()
        # The first token of a segment would be predicted from the end of the one before it.
        labels[starts] = IGNORE_INDEX
        steps = torch.arange(total) - starts.repeat_interleave(lengths)
        borders = torch.cat([torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)])
        longest = int(lengths.max())
        batch = {
            "input_ids": row["input_ids"][None],
            "labels": labels[None],
            "position_ids": torch.cat([steps[None], row["position_ids"]])[:, None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if "loss_weights" in row:
            batch["loss_weights"] = row["loss_weights"][None]
        if "dataset" in row:
            batch["dataset"] = row["dataset"]
        return batch | join_media([row])


def _pad(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)
