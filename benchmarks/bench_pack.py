"""A million samples of known lengths joined to packs: how full, how fast, against packing in order.

    .venv/bin/python benchmarks/bench_pack.py [--rounds 5] [--quick] [--output FILE]

    tokens, patches of 1,000,000 synthetic samples
      --plan_packs | next fit, shuffled--> packs --every sample once, no budget exceeded?--> fill, seconds

The mix: texts of 20 to 4,000 tokens, none to four pictures of 256 to 16,384 patches, one in twenty a video.
Goals: the tighter budget 98 % full; under 10 s on one core. Results go to benchmarks/results/pack.json; with
--quick only where --output says.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

from qwenvl.data.packing import plan_packs

ROOT = Path(__file__).resolve().parents[1]
BUDGETS: tuple[tuple[int, int | None], ...] = ((16384, None), (16384, 65536), (16384, 49000), (16384, 32768))
Packs = list[np.ndarray]


def mix(count: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [count], patches [count]."""
    random = np.random.default_rng(0)
    text = np.clip(random.lognormal(5.3, 1.0, count), 20, 4000).astype(int)
    pictures = random.choice(5, count, p=[0.3, 0.45, 0.12, 0.08, 0.05])
    sizes = np.clip(random.lognormal(7.6, 0.9, (4, count)), 256, 16384).astype(int) // 4 * 4
    patches = (sizes * (np.arange(4)[:, None] < pictures)).sum(0)
    videos = random.random(count) < 0.05
    patches[videos] = random.integers(500, 6000, videos.sum()) * 4
    return text + patches // 4, patches


def next_fit(tokens: np.ndarray, patches: np.ndarray, token_budget: int, patch_budget: int | None) -> Packs:
    """A pack is closed when the next sample, in shuffled order, does not fit."""
    order = np.random.default_rng(0).permutation(len(tokens))
    packs: Packs = []
    first, used, seen = 0, 0, 0
    most = patch_budget or np.inf
    for at, (length, size) in enumerate(zip(tokens[order].tolist(), patches[order].tolist(), strict=True)):
        if at > first and (used + length > token_budget or seen + size > most):
            packs.append(order[first:at])
            first, used, seen = at, 0, 0
        used, seen = used + length, seen + size
    return [*packs, order[first:]]


def check(packs: Packs, tokens: np.ndarray, patches: np.ndarray, budgets: tuple[int, int | None]) -> None:
    borders = np.cumsum([0, *map(len, packs)])[:-1]
    flat = np.concatenate(packs)
    if not np.array_equal(np.sort(flat), np.arange(len(tokens))):
        sys.exit("a sample is missing or stands twice: nothing is reported")
    for sizes, budget in zip((tokens, patches), budgets, strict=True):
        if budget is not None and np.add.reduceat(sizes[flat], borders).max() > budget:
            sys.exit(f"a pack exceeds its budget of {budget}: nothing is reported")


def case(count: int, rounds: int, budgets: tuple[int, int | None]) -> dict[str, Any]:
    tokens, patches = mix(count)
    fits = (tokens <= budgets[0]) & (patches <= (budgets[1] or np.inf))
    tokens, patches = tokens[fits], patches[fits]
    ways: dict[str, Callable[[], Packs]] = {
        "plan_packs": lambda: plan_packs(tokens, patches, *budgets, seed=0),
        "next_fit": lambda: next_fit(tokens, patches, *budgets),
    }
    report: dict[str, Any] = {"budgets": budgets, "samples": len(tokens)}
    for name, way in ways.items():
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            packs = way()
            seconds.append(time.perf_counter() - began)
        check(packs, tokens, patches, budgets)
        fill = [int(tokens.sum()) / budgets[0] / len(packs)]
        fill += [int(patches.sum()) / budgets[1] / len(packs)] if budgets[1] else []
        report[name] = {
            "packs": len(packs), "fill": fill, "seconds": statistics.median(seconds),
            "fastest": min(seconds), "slowest": max(seconds),
        }  # fmt: skip
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1 round of 50,000 samples: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/pack.json")
    options = parser.parse_args()
    rounds, count = (1, 50_000) if options.quick else (options.rounds, 1_000_000)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    result = provenance("numpy") | {"rounds": rounds, "cases": []}
    for budgets in BUDGETS:
        report = case(count, rounds, budgets)
        result["cases"].append(report)
        print(f"{report['samples']:,} samples, {budgets[0]} tokens and {budgets[1] or 'any'} patches a pack")
        for name in ("plan_packs", "next_fit"):
            one = report[name]
            full = " and ".join(f"{share:.1%}" for share in one["fill"])
            print(f"  {name:10} {one['packs']:7,} packs, {full} full, {one['seconds']:.1f} s on one core")
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/pack.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
