"""A billion streamed rows on 1,024 processes: what each reads, holds and waits for; how alike steps cost.

    .venv/bin/python benchmarks/simulate_stream.py [--rounds 3] [--quick] [--output FILE]

    a real file --find_rows--> index, rows of random places --rows found?--> bytes and rows a second
    a file of 10^9 rows of 1,000 bytes, its rows and their index entries written where they are asked for
      --some of 1,024 ranks, each a fresh process--> seconds to the first rows, and to those at the end;
                                                     rows a second, memory, bytes
      --all ranks, some steps; a short file, whole passes--> no row read twice in a pass, none left out,
                                                             all as one process finds them?
    1,000,000 samples a shard --plan_packs--> packs --in steps of 1,024, drawn at random | balanced_order-->
                                                  mean cost of a step's packs over the dearest

All is the code that training runs, but for the media: EndlessRows, RowStream, find_rows, plan_packs,
balanced_order. The long file has holes where nothing is asked for, so it takes megabytes. Files lie in the
folder for temporary files (best TMPDIR=/dev/shm: disks that discard what is freed take minutes to delete) and
are read from memory, not from disk or over a network. Packs cost what the 4B Qwen3-VL computes for them.
Results go to benchmarks/results/stream.json; with --quick only where --output says.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from bench_pack import check, mix
from provenance import provenance
from torch.utils.data import BatchSampler

from qwenvl.data import lines
from qwenvl.data.flops import MultiplyAdds
from qwenvl.data.lines import find_rows
from qwenvl.data.packed import RowSizes
from qwenvl.data.packing import balanced_order, plan_packs
from qwenvl.data.streaming import EndlessRows, RowStream
from qwenvl.nano.architecture import published_config
from qwenvl.nano.tokenizer import nano_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RANKS = 1024
ROWS = 10**9
ROW_BYTES = 1000
BUFFER = 1_000_000
BUDGETS = (16384, 49152)
ASKED = (0, 1, 511, 1023)


@dataclass(frozen=True)
class Numbers:
    """So many rows, each its number, of no file."""

    count: int
    path: Path = Path("numbers")

    def __len__(self) -> int:
        return self.count

    def where(self, index: int) -> str:
        return f"row {index}"

    def row(self, index: int) -> int:
        return index


def order(rows: Any, buffer: int) -> EndlessRows:
    return EndlessRows([RowStream("rows", rows, "", 1.0, False, 0)], None, buffer=buffer, seed=0)


def timed(rounds: int, way: Callable[[], Any]) -> dict[str, float]:
    """Seconds: median, extremes."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


# ---- a real file


def real_file(folder: Path, blocks: int, rounds: int) -> dict[str, Any]:
    """An index built, and rows read at random, by one process."""
    path, chance = folder / "real.jsonl", random.Random(0)
    block = [
        {"image": f"{number}.jpg", "conversations": [
            {"from": "human", "value": "q" * chance.randint(100, 700)},
            {"from": "gpt", "value": "a" * chance.randint(100, 1000)},
        ]} for number in range(10_000)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in block)
    with path.open("w") as file:
        for _ in range(blocks):
            file.write(text)
    size, count = path.stat().st_size, blocks * len(block)

    def build() -> None:
        (folder / ".real.jsonl.rows").unlink(missing_ok=True)
        find_rows(path)

    built = timed(rounds, build)
    rows = find_rows(path)
    picked = [chance.randrange(count) for _ in range(min(count, 50_000))]
    if len(rows) != count or any(rows.row(at) != block[at % len(block)] for at in picked[:2000]):
        sys.exit("a row of the real file is not where the index says: nothing is reported")
    read = timed(rounds, lambda: [rows.row(at) for at in picked])
    path.unlink()
    return {
        "bytes": size, "rows": count, "build_seconds": built, "bytes_per_second": size / built["median"],
        "rows_per_second": count / built["median"], "index_bytes": 8 * (count + 1 + lines.HEADER),
        "read_seconds": read, "random_rows_per_second": len(picked) / read["median"],
    }  # fmt: skip


# ---- 1,024 ranks


def check_passes(count: int) -> None:
    """Two passes over a short file: what all ranks get together is what one process gets."""
    endless = order(Numbers(count), 1000)
    alone = [endless.at(place)[1] for place in range(2 * count)]
    for each in (alone[:count], alone[count:]):
        if sorted(each) != list(range(count)):
            sys.exit("a pass leaves a row out or reads one twice: nothing is reported")
    for rank in range(RANKS):
        own = pickle.loads(pickle.dumps(endless))
        if [own.at(place)[1] for place in range(rank, 2 * count, RANKS)] != alone[rank::RANKS]:
            sys.exit(f"rank {rank} does not get its part of the order: nothing is reported")


def first_steps(steps: int) -> list[int]:
    """Of a pass over the billion: at its beginning, in its middle, at its end."""
    last = ROWS // RANKS - steps
    return [0, last // 2, last]


def check_steps(steps: int) -> int:
    """Rows that several ranks read, at those steps, of all ranks."""
    endless, found = order(Numbers(ROWS), BUFFER), []
    for first in first_steps(steps):
        found += [endless.at(place)[1] for place in range(first * RANKS, (first + steps) * RANKS)]
    return len(found) - len(set(found))


def write_asked(path: Path, ranks: tuple[int, ...], steps: int) -> None:
    """The long file, and its index, as far as these ranks will ask; the rest are holes."""
    endless = order(Numbers(ROWS), BUFFER)
    places = [
        (first + step) * RANKS + rank
        for first in first_steps(steps) for step in range(steps) for rank in ranks
    ]  # fmt: skip
    asked = np.array([endless.at(place)[1] for place in places])
    with path.open("wb") as file:
        file.truncate(ROWS * ROW_BYTES)
        for row in asked.tolist():
            os.pwrite(file.fileno(), b"%-*d\n" % (ROW_BYTES - 1, row), row * ROW_BYTES)
    stamp = (path.stat().st_size, path.stat().st_mtime_ns)
    index = path.with_name(f".{path.name}.rows")
    with index.open("wb") as file:
        file.truncate(8 * (lines.HEADER + ROWS + 1))
        os.pwrite(file.fileno(), np.array([lines.FORMAT, *stamp, ROWS]).tobytes(), 0)
        for row in asked.tolist():
            entries = np.array([row, row + 1]) * ROW_BYTES
            os.pwrite(file.fileno(), entries.tobytes(), 8 * (lines.HEADER + row))


def held() -> dict[str, int]:
    """Bytes of this process: its own, and pages of files, which processes share, on a disk or in memory."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, disk, memory = (int(status[f"Rss{name}"].split()[0]) * 1024 for name in ("Anon", "File", "Shmem"))
    return {"own": own, "files": disk + memory}


def one_rank(path: Path, rank: int, steps: int) -> dict[str, Any]:
    """What a rank does from its start, in a fresh process."""
    expected, read, real = order(Numbers(ROWS), BUFFER), [], os.pread
    before = held()

    def counted(descriptor: int, count: int, at: int) -> bytes:
        read.append(count)
        return real(descriptor, count, at)

    os.pread = counted
    began = time.perf_counter()
    endless = order(find_rows(path), BUFFER)
    report: dict[str, Any] = {
        "rank": rank,
        "open_seconds": time.perf_counter() - began,
        "to_rows_seconds": [],
    }
    reading = 0.0
    for first in first_steps(steps):
        began = time.perf_counter()
        for step in range(first, first + steps):
            stream, index = endless.at(step * RANKS + rank)
            if stream.row(index) != index:
                sys.exit(f"rank {rank}: row {index} is not itself: nothing is reported")
            if step == first:
                report["to_rows_seconds"].append(time.perf_counter() - began)
        reading += time.perf_counter() - began
    after = held()
    for step in (first_steps(steps)[-1], 0):
        place = step * RANKS + rank
        if endless.at(place)[1] != expected.at(place)[1]:
            sys.exit(f"rank {rank}: not its part of the order: nothing is reported")
    done = 3 * steps
    return report | {
        "rows_read": len(read), "rows_per_second": done / reading,
        "share_of_file": sum(read) / (done * RANKS * ROW_BYTES),
        "memory": {name: after[name] - before[name] for name in after},
    }  # fmt: skip


def billion(folder: Path, ranks: tuple[int, ...], steps: int, checked: int) -> dict[str, Any]:
    check_passes(checked)
    twice = check_steps(steps)
    if twice:
        sys.exit(f"{twice} rows are read by several ranks: nothing is reported")
    path = folder / "billion.jsonl"
    write_asked(path, ranks, steps)
    reports = []
    for rank in ranks:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            reports.append(fresh.apply(one_rank, (path, rank, steps)))
    return {
        "rows": ROWS, "bytes": ROWS * ROW_BYTES, "ranks": RANKS, "buffer": BUFFER,
        "rows_of_whole_passes_checked": 2 * checked, "rows_read_by_several_ranks": twice, "each": reports,
    }  # fmt: skip


def counting_past(places: int) -> float:
    """Seconds for which the libraries' samplers of a resumed run count past a place, one row a batch."""
    batches = BatchSamplerShard(
        BatchSampler(range(places + RANKS), 1, False), num_processes=RANKS, process_index=0
    )
    began = time.perf_counter()
    next(iter(SkipBatchSampler(batches, places // RANKS)))
    return (time.perf_counter() - began) / places


# ---- packs


def pack_costs(shards: int, count: int) -> np.ndarray:
    """What the packs of so many shards cost, each shard planned by itself as tools/pack_data.py does."""
    tokens, patches = mix(shards * count)
    cost = MultiplyAdds.of(published_config("qwen3_vl", "4B", nano_tokenizer("qwen3_vl")))
    costs = []
    for shard in np.split(np.arange(shards * count), shards):
        shard = shard[(tokens[shard] <= BUDGETS[0]) & (patches[shard] <= BUDGETS[1])]
        long, wide = tokens[shard], patches[shard]
        packs = plan_packs(long, wide, *BUDGETS, seed=0)
        check(packs, long, wide, BUDGETS)
        none = np.zeros(len(shard), np.int64)
        sizes = RowSizes(long, wide, long**2, none.astype(bool), none, none, none, {}, [])
        costs.append(sizes.costs(packs, cost))
    return np.concatenate(costs)


def efficiency(costs: np.ndarray, order: np.ndarray, together: int) -> dict[str, float]:
    """Of the steps of an order: the share of the time that processes work, if cost is time."""
    steps = costs[order[: len(costs) // together * together]].reshape(-1, together)
    each = steps.mean(1) / steps.max(1)
    return {
        "mean_over_dearest": float(steps.mean(1).sum() / steps.max(1).sum()), "worst_step": float(each.min())
    }  # fmt: skip


def balance(shards: int, count: int, together: int) -> dict[str, Any]:
    costs = pack_costs(shards, count)
    drawn = np.random.default_rng(0).permutation(len(costs))
    return {
        "shards": shards, "samples": shards * count, "budgets": BUDGETS, "packs": len(costs),
        "together": together, "steps": len(costs) // together,
        "random_order": efficiency(costs, drawn, together),
        "balanced_order": efficiency(costs, balanced_order(costs, together, [0, 0]), together),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one rank, few rows: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/stream.json")
    options = parser.parse_args()
    quick = options.quick
    result = provenance("numpy", "torch", "accelerate") | {"rounds": 1 if quick else options.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        real = result["real_file"] = real_file(folder, 1 if quick else 200, result["rounds"])
        ranks, steps, checked = (ASKED[1:2], 5, 5000) if quick else (ASKED, 400, 100_000)
        long = result["billion"] = billion(folder, ranks, steps, checked)
    share = long["bytes"] / RANKS
    long["scan_seconds_a_rank"] = share / real["bytes_per_second"]
    long["scan_seconds_alone"] = long["bytes"] / real["bytes_per_second"]
    long["sampler_seconds_to_the_end"] = ROWS * counting_past(RANKS * (100 if quick else 5000))
    packs = result["packs"] = balance(1, 20_000, 32) if quick else balance(4, 1_000_000, RANKS)
    show(real, long, packs)
    output = options.output or (None if quick else ROOT / "benchmarks/results/stream.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


def show(real: dict, long: dict, packs: dict) -> None:
    built = real["bytes_per_second"] / 1e9, real["rows_per_second"]
    print(f"index: {built[0]:.2f} GB/s, {built[1]:,.0f} rows/s")
    print(f"random rows: {real['random_rows_per_second']:,.0f} a second, parsed")
    alone, each = long["scan_seconds_alone"] / 60, long["scan_seconds_a_rank"]
    print(f"10^9 rows, 1 TB: scanned once, {each:.1f} s a rank, {alone:.0f} min for one process alone")
    for each in long["each"]:
        first, _, last = (1e3 * seconds for seconds in each["to_rows_seconds"])
        own, shared = (each["memory"][name] / 2**20 for name in ("own", "files"))
        print(
            f"  rank {each['rank']:4}: open {each['open_seconds'] * 1e3:.0f} ms, first {first:.0f} ms, last "
            f"steps {last:.0f} ms; {each['rows_per_second']:,.0f} rows/s; {own:.0f} MiB, {shared:.0f} MiB of "
            f"files; 1/{1 / each['share_of_file']:.0f} of the file"
        )
    print(f"rows read by several ranks: {long['rows_read_by_several_ranks']}")
    print(f"a resume at the end: samplers count past it in {long['sampler_seconds_to_the_end']:.0f} s")
    for way in ("random_order", "balanced_order"):
        mean, worst = packs[way]["mean_over_dearest"], packs[way]["worst_step"]
        print(f"{way}: mean over dearest {mean:.1%}, worst step {worst:.1%}")


if __name__ == "__main__":
    main()
