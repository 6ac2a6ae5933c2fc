"""Packing on the fly: the rows of a data set measured and joined to packs, the same for the whole run.

    SupervisedDataset, N rows
      -> measure_rows   sizes from headers, each process a share of the rows, told to all
      -> plan_packs     a row that is a packed list already stays a pack by itself
      -> PackedDataset[i] -> one item, the join of its rows
      -> PackSampler    an epoch's order, in which the packs of one step cost about the same

The cost of a pack: the multiply-adds of the linear layers of both towers, and those of causal attention,
which grow with the square of each sample's length. The vision tower's attention is left out, since of the
pictures only the sum of their patches is kept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import PreTrainedConfig

from qwenvl.data.budget import TooLong
from qwenvl.data.flops import MultiplyAdds
from qwenvl.data.packing import balanced_order, join, plan_packs

if TYPE_CHECKING:
    from qwenvl.data.data_processor import SupervisedDataset

logger = logging.getLogger(__name__)

SHOWN_REASONS = 10
CHUNK = 64


@dataclass(frozen=True, eq=False)
class RowSizes:
    """Of each row of a data set, int64 [N]: tokens, patches, the sum of its samples' tokens squared; bool
    [N]: whether it is a packed list; int64 [N]: samples shortened, turns and media gone from them.  bad: the
    reason why a row cannot be used, long: rows that --too_long skip leaves out.
    """

    tokens: np.ndarray
    patches: np.ndarray
    squares: np.ndarray
    whole: np.ndarray
    shortened: np.ndarray
    turns: np.ndarray
    media: np.ndarray
    bad: dict[int, str]
    long: list[int]

    def good(self) -> np.ndarray:
        """The rows that can be used."""
        return np.setdiff1d(np.arange(len(self.tokens)), [*self.bad, *self.long])

    def costs(self, packs: list[np.ndarray], cost: MultiplyAdds) -> np.ndarray:
        """What each pack costs in one forward pass."""
        patch = cost.patch + cost.merger
        rows = cost.token * self.tokens + patch * self.patches + cost.square * self.squares
        return np.array([rows[pack].sum() for pack in packs])


class PackedDataset(Dataset):
    """Packs of a data set's rows. `costs` float64 [packs].

    A row that cannot be loaded stops the run, or with bad_samples="skip" is left out of its pack; where none
    of a pack can be loaded, the next pack stands in.
    """

    def __init__(self, rows: SupervisedDataset, packs: list[np.ndarray], costs: np.ndarray):
        self.rows = rows
        self.packs = packs
        self.costs = costs
        self.skipped = 0

    @property
    def names(self) -> list[str]:
        """Of the data sets."""
        return self.rows.names

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        items = []
        for row in self.packs[index].tolist():
            try:
                items.append(self.rows.load(row))
            except ValueError as error:
                if self.rows.bad_samples == "fail":
                    raise
                self.skipped += 1
                logger.warning("left out of its pack (%d in this process): %s", self.skipped, error)
        return join(items) if items else self[(index + 1) % len(self)]


class PackSampler(Sampler[int]):
    """The packs of an epoch in a balanced order, which depends on the seed and the epoch alone.

    together: packs of one step over all processes; epoch: asked when an epoch's iteration begins.
    """

    def __init__(self, costs: np.ndarray, together: int, seed: int, epoch: Callable[[], int]):
        self.costs = costs
        self.together = together
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[int]:
        return iter(balanced_order(self.costs, self.together, [self.seed, self.epoch()]).tolist())


def pack_rows(
    rows: SupervisedDataset, config: PreTrainedConfig, *, patch_budget: int | None, seed: int
) -> PackedDataset:
    """Pack a data set under the budgets of `model_max_length` tokens and `patch_budget` patches.

    Raises ValueError, with file and row, for a row that cannot be measured or exceeds a budget by itself;
    with bad_samples="skip" such rows are left out, said so in the log.
    """
    token_budget = rows.encode.model_max_length
    sizes = measure_rows(rows, patch_budget)
    good = _report(sizes, rows, "packing")
    free, whole = good[~sizes.whole[good]], good[sizes.whole[good]]
    plan = plan_packs(sizes.tokens[free], sizes.patches[free], token_budget, patch_budget, seed)
    packs = [free[pack] for pack in plan] + [whole[at : at + 1] for at in range(len(whole))]
    packs.sort(key=lambda pack: pack.min())
    for line in describe_packs(sizes, packs, token_budget, patch_budget):
        logger.info(line)
    return PackedDataset(rows, packs, sizes.costs(packs, MultiplyAdds.of(config)))


def all_packed(rows: SupervisedDataset) -> bool:
    """Whether every row is a packed list, so that nothing is left to plan."""
    return all(
        isinstance(source.annotations.row(int(row)), list) for source in rows.sources for row in source.rows
    )


def describe_packs(
    sizes: RowSizes, packs: list[np.ndarray], token_budget: int, patch_budget: int | None
) -> list[str]:
    """How many packs there are and how full they are."""
    used = np.concatenate(packs)
    lines = [f"packing: {len(used)} rows in {len(packs)} packs"]
    for what, each, budget in (
        ("tokens", sizes.tokens, token_budget),
        ("patches", sizes.patches, patch_budget),
    ):
        total = int(each[used].sum())
        fill = f", {total / (budget * len(packs)):.1%} of {budget} a pack" if budget else ""
        lines.append(f"packing: {total} {what}{fill}")
    return lines


def usable_rows(rows: SupervisedDataset, what: str) -> np.ndarray:
    """The rows that fit into `model_max_length`, by the policy --too_long; what it did is logged.

    what: the rows are for, in the log. Raises ValueError, with file and row, for one that cannot be measured
    or made to fit; with bad_samples="skip" only where none is left.
    """
    return _report(measure_rows(rows, None), rows, what)


def _report(sizes: RowSizes, rows: SupervisedDataset, what: str) -> np.ndarray:
    """Says what is left out and what was shortened; returns the rows that can be used."""
    if sizes.long:
        logger.warning("%s: left out %d rows above --model_max_length", what, len(sizes.long))
    if sizes.shortened.any():
        logger.warning(
            "%s: shortened %d samples to --model_max_length; gone: %d turns, %d pictures and videos",
            what, sizes.shortened.sum(), sizes.turns.sum(), sizes.media.sum(),
        )  # fmt: skip
    good = sizes.good()
    _refuse(sizes.bad, rows, what)
    if not len(good):
        raise ValueError(f"{what}: no row can be used; see the reasons logged above")
    return good


def _refuse(bad: dict[int, str], rows: SupervisedDataset, what: str) -> None:
    reasons = [reason for _, reason in sorted(bad.items())]
    if not reasons:
        return
    if rows.bad_samples == "fail":
        more = f" ({len(reasons) - 1} more of {len(rows)} rows are bad too)" if len(reasons) > 1 else ""
        raise ValueError(reasons[0] + more)
    for reason in reasons[:SHOWN_REASONS]:
        logger.warning("skipped: %s", reason)
    logger.warning("%s: skipped %d of %d rows", what, len(reasons), len(rows))


def measure_rows(rows: SupervisedDataset, patch_budget: int | None) -> RowSizes:
    """Measure all rows. With several processes each measures a share, and all get all sizes."""
    together = distributed.is_available() and distributed.is_initialized()
    process, processes = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    share = np.arange(process, len(rows), processes)
    chunks = np.split(share, range(CHUNK, len(share), CHUNK))
    found: list[tuple[int, Numbers | str | None]] = []
    bar = tqdm(total=len(share), desc="measuring", unit="row", disable=None if process == 0 else True)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for done in threads.map(lambda chunk: [_measure(rows, int(i), patch_budget) for i in chunk], chunks):
            found += done
            bar.update(len(done))
    if together:
        parts: list = [None] * processes
        distributed.all_gather_object(parts, found)
        found = [each for part in parts for each in part]
    numbers = np.zeros((len(rows), 7), np.int64)
    bad, long = {}, []
    for index, size in found:
        if isinstance(size, str):
            bad[index] = size
        elif size is None:
            long.append(index)
        else:
            numbers[index] = size
    tokens, patches, squares, whole, shortened, turns, media = numbers.T
    return RowSizes(tokens, patches, squares, whole.astype(bool), shortened, turns, media, bad, long)


Numbers = tuple[int, int, int, int, int, int, int]


def _measure(
    rows: SupervisedDataset, index: int, patch_budget: int | None
) -> tuple[int, Numbers | str | None]:
    """A row's index with its numbers, with the reason why it cannot be used, or None where it is too long and
    such rows are left out.
    """
    source, row_index = rows.row(index)
    where = source.annotations.where(row_index)
    try:
        samples = rows.fitted(index)
    except ValueError as error:
        left_out = isinstance(error, TooLong) and rows.encode.too_long == "skip"
        return index, None if left_out else str(error)
    tokens = np.array([sample.size.tokens for sample in samples])
    patches = sum(sample.size.patches for sample in samples)
    whole = isinstance(source.annotations.row(row_index), list)
    if patch_budget is not None and patches > patch_budget and not whole:
        reason = (
            f"{patches} patches exceed --pack_max_patches {patch_budget}; raise it, or lower --max_pixels"
        )
        return index, f"{where}: {reason} or --video_max_pixels"
    turns, media = (sum(getattr(sample, name) for sample in samples) for name in ("turns", "media"))
    shortened = sum(bool(sample.turns or sample.media) for sample in samples)
    return index, (
        int(tokens.sum()), patches, int((tokens**2).sum()), int(whole), shortened, turns, media,
    )  # fmt: skip
