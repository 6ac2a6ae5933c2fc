"""Positions of tokens in time, height and width: the same numbers as the model library's `get_rope_index`.

    text      one step a token, the same in all three rows
    medium    t, h, w of its merged grid, counted from the position where it begins; the text after it
              begins max(height, width) of the merged grid further on, whatever its length in time

What differs between the families is only what a video's grid is taken for (one strategy each):

    qwen2_vl                 one block [t, h, w], one step of time per grid row
    qwen2_5_vl               one block [t, h, w], tokens_per_second * second_per_grid_ts steps per row
    qwen3_vl, qwen3_5        t blocks [1, h, w], each behind the text of its own timestamp; their MoEs too

The model library is what answering runs, so it is what training must agree with. The original's
fine-tuning code moved the text after a Qwen2-VL or Qwen2.5-VL video beyond its last moment instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

IMAGE, VIDEO = 1, 2


@dataclass(frozen=True)
class Block:
    """What one run of placeholder tokens stands for: a grid in patches, and steps of time per grid row."""

    time: int
    height: int
    width: int
    interval: float | torch.Tensor = 1

    def tokens(self, merge: int) -> int:
        """How many placeholder tokens the block has, with `merge` x `merge` patches in a token."""
        return self.time * (self.height // merge) * (self.width // merge)


def get_rope_index_2(
    spatial_merge_size: int = 2,
    input_ids: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    image_token_id: int,
    video_token_id: int,
    tokens_per_second: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen2-VL: positions int64 [3, B, S] and, per sample, last position + 1 - length, int64 [B, 1].

    input_ids [B, S]; grids [n, 3] in patches (time, height, width), in the order of the placeholders over
    the whole batch; attention_mask [B, S], 0 where a token is padding (position 0). `second_per_grid_ts` and
    `tokens_per_second` are Qwen2.5-VL's and unused. Raises ValueError where placeholders and grids differ.
    """
    blocks = {IMAGE: _blocks(image_grid_thw), VIDEO: _blocks(video_grid_thw)}
    return _batch(spatial_merge_size, input_ids, attention_mask, blocks, (image_token_id, video_token_id))


def get_rope_index_25(
    spatial_merge_size: int = 2,
    input_ids: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    image_token_id: int,
    video_token_id: int,
    tokens_per_second: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen2.5-VL: as `get_rope_index_2`, with time in seconds.

    second_per_grid_ts [number of videos]: seconds between grid rows, from the frames really sampled;
    tokens_per_second: `vision_config.tokens_per_second`. Both are needed where there is a video.
    """
    videos = _blocks(video_grid_thw)
    if videos:
        if second_per_grid_ts is None or tokens_per_second is None or len(second_per_grid_ts) != len(videos):
            raise ValueError(
                f"{len(videos)} videos need as many second_per_grid_ts, found {second_per_grid_ts}, "
                f"and tokens_per_second, found {tokens_per_second}"
            )
        # Multiplied as the model library multiplies, so that rounding down falls on the same side.
        videos = [
            Block(block.time, block.height, block.width, tokens_per_second * seconds)
            for block, seconds in zip(videos, second_per_grid_ts, strict=True)
        ]
    blocks = {IMAGE: _blocks(image_grid_thw), VIDEO: videos}
    return _batch(spatial_merge_size, input_ids, attention_mask, blocks, (image_token_id, video_token_id))


def get_rope_index_3(
    spatial_merge_size: int = 2,
    input_ids: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    image_token_id: int,
    video_token_id: int,
    tokens_per_second: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen3-VL and Qwen3.5, dense and MoE: as `get_rope_index_2`, each grid row of a video its own block."""
    videos = [
        Block(1, block.height, block.width) for block in _blocks(video_grid_thw) for _ in range(block.time)
    ]
    blocks = {IMAGE: _blocks(image_grid_thw), VIDEO: videos}
    return _batch(spatial_merge_size, input_ids, attention_mask, blocks, (image_token_id, video_token_id))


STRATEGIES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "qwen2_vl": get_rope_index_2,
    "qwen2_5_vl": get_rope_index_25,
    "qwen3_vl": get_rope_index_3,
    "qwen3_vl_moe": get_rope_index_3,
    "qwen3_5": get_rope_index_3,
    "qwen3_5_moe": get_rope_index_3,
}


@dataclass(frozen=True)
class RopeIndex:
    """The strategy of one checkpoint, with the numbers it needs from its configuration."""

    model_type: str
    spatial_merge_size: int
    image_token_id: int
    video_token_id: int
    tokens_per_second: float | None

    @classmethod
    def from_config(cls, config) -> RopeIndex:
        """Read a checkpoint's configuration. Raises ValueError for a `model_type` without a strategy."""
        name = config.model_type
        if name not in STRATEGIES:
            raise ValueError(f"no positions for model_type {name!r}; known: {', '.join(STRATEGIES)}")
        vision = config.vision_config
        seconds = vision.tokens_per_second if name == "qwen2_5_vl" else None
        return cls(name, vision.spatial_merge_size, config.image_token_id, config.video_token_id, seconds)

    def __call__(
        self,
        input_ids: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Positions int64 [3, B, S] of input_ids [B, S]."""
        positions, _ = STRATEGIES[self.model_type](
            self.spatial_merge_size,
            input_ids,
            image_grid_thw,
            video_grid_thw,
            second_per_grid_ts,
            attention_mask,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            tokens_per_second=self.tokens_per_second,
        )
        return positions


def _blocks(grid_thw: torch.Tensor | None) -> list[Block]:
    return [] if grid_thw is None else [Block(*grid) for grid in grid_thw.tolist()]


def _batch(
    merge: int,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    blocks: dict[int, list[Block]],
    token_ids: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of every row of a batch; the rows take their blocks from the lists in turn."""
    if input_ids is None or input_ids.dim() != 2:
        raise ValueError(f"input_ids must be a tensor [batch, length], found {input_ids}")
    ids = input_ids.cpu().numpy()
    mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy()
    kinds = (ids == token_ids[0]) * IMAGE + (ids == token_ids[1]) * VIDEO
    waiting = {kind: iter(of_kind) for kind, of_kind in blocks.items()}
    positions = np.zeros((3, *ids.shape), np.int64)
    deltas = np.zeros((len(ids), 1), np.int64)
    for row, kept in enumerate(mask.astype(bool)):
        found = _positions(kinds[row, kept], waiting, merge)
        positions[:, row, kept] = found
        deltas[row] = found.max(initial=-1) + 1 - found.shape[1]
    for kind, name in ((IMAGE, "image"), (VIDEO, "video")):
        if left := len(list(waiting[kind])):
            raise ValueError(f"{left} {name} grids without placeholder tokens; ids and grids must match")
    device = input_ids.device
    return torch.from_numpy(positions).to(device), torch.from_numpy(deltas).to(device)


def _positions(kinds: np.ndarray, waiting: dict[int, Iterator[Block]], merge: int) -> np.ndarray:
    """kinds [L] (0 text, IMAGE, VIDEO) -> positions [3, L]."""
    positions = np.empty((3, len(kinds)), np.int64)
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    now = 0
    for start, end in pairwise(borders):
        kind = int(kinds[start]) if start < end else 0
        if not kind:
            positions[:, start:end] = np.arange(now, now + end - start)
            now += end - start
            continue
        block = next(waiting[kind], None)
        if block is None or block.tokens(merge) != end - start:
            raise ValueError(f"{end - start} placeholder tokens at {start} do not fit their grid, {block}")
        grid = np.indices((block.time, block.height // merge, block.width // merge)).reshape(3, -1)
        if block.time > 1:
            grid[0] = (torch.arange(block.time) * block.interval).long().numpy()[grid[0]]
        positions[:, start:end] = grid + now
        now += max(block.height, block.width) // merge
    return positions
