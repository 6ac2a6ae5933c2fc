"""Several samples as one item: which ones go together, and how they are laid end to end.

    sizes of all samples: tokens [N], patches [N]; a budget for each
      -> plan_packs -> packs: N indices in as few lists as possible, no list over a budget
      -> balanced_order -> packs by rounds: the processes' packs of one step cost about the same

    n samples with input_ids [L_i], labels [L_i], position_ids [3, L_i], segment_lengths [1], pixels
      -> join -> one item: input_ids, labels [sum L], position_ids [3, sum L], segment_lengths [n], pixels

A plan depends on the sizes, the budgets and the seed alone, not on the process or on how many there are.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import torch

# Entries that are laid end to end over samples in the order of their placeholders, where a sample has them.
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")

# Samples are kept apart by their share of the patch budget over their share of the token budget.
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0, 4 / 3, 2.0, 4.0, np.inf)
# Packs are balanced among this many rounds drawn at random, so that their neighbours change every epoch.
ROUNDS = 64


class _Shelf:
    """Samples of similar ratio, by their size in the budget of which they take the larger share.

    rows: of samples with `low` < ratio <= `high`, already shuffled. Removing is all that happens, so sizes
    that are used up point to the next smaller one, as in a union-find.
    """

    def __init__(self, rows: np.ndarray, sizes: np.ndarray, slope: float):
        order = np.argsort(sizes[rows], kind="stable")
        self.rows = rows[order].tolist()
        kinds, starts = np.unique(sizes[rows[order]], return_index=True)
        self.sizes = kinds.tolist()
        self.starts = starts.tolist()
        self.ends = [*self.starts[1:], len(self.rows)]
        self.slope = slope
        self._smaller = list(range(len(self.sizes) + 1))

    def take(self, room: float, other_room: float) -> int | None:
        """Remove and return the largest sample that surely fits; of equal ones any."""
        if self.slope:
            # No sample here takes more of the other budget than size * slope.
            room = min(room, other_room / self.slope)
        smaller = self._smaller
        at = bisect_right(self.sizes, room)
        while smaller[at] != at:
            smaller[at] = smaller[smaller[at]]
            at = smaller[at]
        if at == 0:
            return None
        self.ends[at - 1] -= 1
        end = self.ends[at - 1]
        if end == self.starts[at - 1]:
            smaller[at] = at - 1
        return self.rows[end]


def plan_packs(
    tokens: np.ndarray, patches: np.ndarray, token_budget: int, patch_budget: int | None, seed: int
) -> list[np.ndarray]:
    """Spread samples over packs: every index once, the sums of tokens and patches of a pack within budgets.

    tokens, patches: int [N], of each sample; patch_budget None: no limit. A pack is filled with the largest
    sample that fits, from the side (rich or poor in patches) that brings it nearer to the ratio of all data,
    most extreme first. So both budgets are used up alike over the whole plan, and what is left at the end is
    close to the mean, easy to fit.

    Raises ValueError with the first index where a sample alone exceeds a budget.
    """
    tokens, patches = np.asarray(tokens, np.int64), np.asarray(patches, np.int64)
    for sizes, budget, what in ((tokens, token_budget, "tokens"), (patches, patch_budget, "patches")):
        if budget is not None and (over := np.flatnonzero(sizes > budget)).size:
            raise ValueError(
                f"sample {over[0]}: {sizes[over[0]]} {what} exceed the budget of {budget} a pack"
            )
    if patch_budget is None:
        patches, patch_budget = np.zeros_like(tokens), 1
    poor, rich, ratio = _shelves(tokens, patches, token_budget, patch_budget, seed)
    when_poor, when_rich = rich + poor[::-1], poor + rich[::-1]
    token_sizes, patch_sizes = tokens.tolist(), patches.tolist()
    packs: list[np.ndarray] = []
    count = 0
    while count < len(token_sizes):
        pack: list[int] = []
        token_room, patch_room = token_budget, patch_budget
        while True:
            share = (patch_budget - patch_room) * token_budget
            lacking = share < ratio * (token_budget - token_room) * patch_budget
            for shelf, by_patches in when_poor if lacking else when_rich:
                rooms = (patch_room, token_room) if by_patches else (token_room, patch_room)
                if (index := shelf.take(*rooms)) is not None:
                    break
            else:
                break
            pack.append(index)
            token_room -= token_sizes[index]
            patch_room -= patch_sizes[index]
        packs.append(np.array(pack))
        count += len(pack)
    return packs


def _shelves(
    tokens: np.ndarray, patches: np.ndarray, token_budget: int, patch_budget: int, seed: int
) -> tuple[list[tuple[_Shelf, bool]], list[tuple[_Shelf, bool]], float]:
    """The shelves poor and rich in patches, most extreme first, each with whether it goes by patches; and the
    ratio of all data.
    """
    token_share, patch_share = tokens / token_budget, patches / patch_budget
    ratios = patch_share / token_share
    mean = float(patch_share.sum() / max(token_share.sum(), 1e-9))
    shuffled = np.random.default_rng(seed).permutation(len(tokens))
    kinds = np.searchsorted(RATIOS, ratios, side="left")[shuffled]
    poor, rich = [], []
    for kind, high in enumerate(RATIOS):
        rows = shuffled[kinds == kind]
        if not len(rows):
            continue
        low = RATIOS[max(kind - 1, 0)]
        by_patches = low >= 1
        sizes = patches if by_patches else tokens
        slope = token_budget / patch_budget / low if by_patches else high * patch_budget / token_budget
        (poor if high <= mean else rich).append((_Shelf(rows, sizes, slope), by_patches))
    return poor, rich[::-1], mean


def balanced_order(costs: np.ndarray, together: int, seed: list[int]) -> np.ndarray:
    """An order of packs in which each `together` packs in a row, one step of all processes, cost alike.

    Packs are drawn at random, ROUNDS steps at a time; those of a draw are sorted by cost and cut into steps,
    which are shuffled. A rest that fills no step stays at the end. seed: of the run, and the epoch.
    """
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(costs))
    whole = len(costs) // together * together
    steps = []
    for start in range(0, whole, ROUNDS * together):
        draw = shuffled[start : min(start + ROUNDS * together, whole)]
        steps += np.split(draw[np.argsort(costs[draw], kind="stable")], len(draw) // together)
    order = [steps[index] for index in random.permutation(len(steps))]
    return np.concatenate([*order, shuffled[whole:]])


def join(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Lay items end to end. `segment_lengths` int64 [n] keeps where each sample ends."""
    if len(items) == 1:
        return items[0]
    joined = {
        key: torch.cat([item[key] for item in items]) for key in ("input_ids", "labels", "segment_lengths")
    }
    if any("loss_weights" in item for item in items):
        joined["loss_weights"] = torch.cat([loss_weights(item) for item in items])
    if all("dataset" in item for item in items):
        joined["dataset"] = torch.cat([item["dataset"] for item in items])
    joined["position_ids"] = torch.cat([item["position_ids"] for item in items], dim=1)
    return joined | join_media(items)


def loss_weights(item: dict[str, torch.Tensor]) -> torch.Tensor:
    """What each token's loss counts, float32 [L]: 1 where the sample does not say."""
    given = item.get("loss_weights")
    return torch.ones(len(item["input_ids"])) if given is None else given


def join_media(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pixels and grids of all items, for those kinds of media that any of them has."""
    found = {key: [item[key] for item in items if key in item] for key in MEDIA}
    return {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in found.items() if parts}
