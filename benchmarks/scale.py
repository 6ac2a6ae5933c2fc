"""What training on 8 to 1,024 GPUs would take, on paper: memory, step time, the loader.

    .venv/bin/python benchmarks/scale.py [--quick] [--output FILE]

    geometry, packs of pictures --step_trace--> seconds at least, tensors kept for the backward pass
      states by sharding + activations -> bytes a GPU                                       memory
      (seconds at least / REACHED) + communication that nothing hides -> a step             time
    published figures beside what the same formulas say; REACHED from the first of them

Results go to benchmarks/results/scale.json, as a page to scale.md beside it. --quick: 2B alone, only where
--output says.

Memory of P parameters, 18 bytes each: weights, gradients and AdamW's two moments in fp32, and weights in
bf16.
    DDP       all of it, and 4 P for the buckets that gradients are sent from
    ZeRO-2    bf16 weights whole, the rest divided by the GPUs
    ZeRO-3    all divided (FSDP alike); two layers and the embeddings whole for a while, 6 bytes a parameter
    on one GPU nothing is divided or sent
Activations: what a traced step keeps for its backward pass. With checkpointing the input of each layer (fp32
in the language model, bf16 in the tower) and all of the one layer that is computed again. And 6 bytes a logit
for its gradient.

Sent each step, V = bytes of what is sent: ZeRO-3 gathers bf16 weights before the forward and before the
backward pass, all reduce or scatter gradients: fp32 in DDP and ZeRO-3, bf16 in ZeRO-2, which then gathers its
weights. V passes a GPU's NVLink, half of 900 GB/s each way; and a node's eight ports of 400 Gb/s where there
are more nodes, whichever is slower; DDP's gradients twice. What goes on in a layer hides behind the
arithmetic of a pass: what is more than that pass, and what one layer sends, shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from roofline import (
    H100,
    H200,
    OPTIMISER_BYTES,
    PACK,
    check,
    forward_products,
    needed,
    pack_of,
    stored,
    table,
)
from step_trace import Device, Kernel, Numbers, size, trace

from qwenvl.data.flops import MultiplyAdds
from qwenvl.nano import nano_tokenizer
from qwenvl.nano.architecture import published_config, random_model
from qwenvl.train.metering import GIB

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "2B": "qwen3_vl", "4B": "qwen3_vl", "8B": "qwen3_vl", "32B": "qwen3_vl", "30B-A3B": "qwen3_vl_moe",
    "235B-A22B": "qwen3_vl_moe",
}  # fmt: skip
GPUS = (8, 64, 256, 1024)
PACKS = (1, 4, 8)
SHARDINGS = ("DDP", "ZeRO-2", "ZeRO-3")
A100 = Device("A100", 312e12, 19.5e12, 2.0e12, 80e9)
NODE, NVLINK, PORT = 8, 450e9, 50e9  # GPUs; bytes a second each way of a GPU's NVLink and network port.
A100_NVLINK, A100_PORT = 300e9, 25e9
LATENCY = 20e-6  # Seconds of a collective for each doubling of the GPUs: an assumption.
USABLE = 0.92  # Share of a GPU's memory: the rest is the context, libraries and holes.


@dataclass(frozen=True)
class Fabric:
    """Bytes a second each way."""

    nvlink: float = NVLINK
    port: float = PORT

    def seconds(self, volume: float, gpus: int, collectives: int) -> float:
        """For `volume` bytes to reach or to leave every GPU, in so many collectives."""
        if gpus == 1:
            return 0.0
        rate = self.nvlink if gpus <= NODE else min(self.nvlink, NODE * self.port)
        return volume * (gpus - 1) / gpus / rate + collectives * LATENCY * math.log2(gpus)


@dataclass(frozen=True)
class Model:
    """Sizes that memory and communication depend on; parameters of a layer of the language model, and of the
    embeddings with lm_head.
    """

    parameters: float
    layer: float
    ends: float
    layers: int


def state_bytes(model: Model, sharding: str, gpus: int) -> float:
    """Weights, gradients and optimiser of a GPU; the module's text says what."""
    if gpus == 1:
        return 18 * model.parameters
    if sharding == "DDP":
        return 22 * model.parameters
    if sharding == "ZeRO-2":
        return (2 + 16 / gpus) * model.parameters
    return 18 / gpus * model.parameters + 6 * (2 * model.layer + model.ends)


def step_seconds(
    forward: float, backward: float, model: Model, sharding: str, gpus: int, fabric: Fabric
) -> tuple[float, float]:
    """The passes' arithmetic in seconds -> a step without its optimiser, and what of it only sends."""
    weights, layers = 2 * model.parameters, model.layers
    before = fabric.seconds(weights, gpus, layers) if sharding == "ZeRO-3" else 0.0
    gradients = {"DDP": 8, "ZeRO-2": 2, "ZeRO-3": 4}[sharding] * model.parameters
    during = before + fabric.seconds(gradients, gpus, layers)
    after = fabric.seconds(weights, gpus, 1) if sharding == "ZeRO-2" else 0.0
    shown = max(0.0, before - forward) + max(0.0, during - backward) + (before + during) / layers + after
    return forward + backward + shown, shown


# Of our models


@dataclass(frozen=True)
class Traced:
    """A size with its packs of pictures; kernels by number of packs, checkpointed."""

    name: str
    model: Model
    numbers: dict[int, Numbers]
    needed: dict[int, float]
    kernels: dict[int, list[Kernel]]
    kept: float
    kept_checkpointed: float
    logits: float

    def passes(self, device: Device, packs: int, checkpointing: bool) -> tuple[float, float]:
        """Seconds at least of the forward and of the backward pass, recomputing included."""
        kernels = self.kernels[packs] if checkpointing else stored(self.kernels[packs])
        forward = sum(kernel.floor(device) for kernel in kernels if kernel.moment == "forward")
        return forward, sum(kernel.floor(device) for kernel in kernels) - forward

    def a_token(self, checkpointing: bool) -> float:
        """Bytes of activations for each token of a step."""
        return ((self.kept_checkpointed if checkpointing else self.kept) + self.logits) / self.numbers[
            1
        ].tokens


def model_of(config: Any) -> Model:
    built = random_model(config, device="meta", dtype=torch.bfloat16, seed=0)
    count = lambda module: sum(weight.numel() for weight in module.parameters())  # noqa: E731
    language = built.model.language_model
    ends = {id(weight): weight.numel() for weight in (built.lm_head.weight, language.embed_tokens.weight)}
    layers = config.text_config.num_hidden_layers
    return Model(count(built), count(language.layers[0]), sum(ends.values()), layers)


def traced(name: str, packs: tuple[int, ...]) -> Traced:
    config: Any = published_config(MODELS[name], name, nano_tokenizer(MODELS[name]))
    batches = {each: pack_of(config, each) for each in packs}
    kernels = {each: trace(config, batch, checkpointing=True).kernels for each, batch in batches.items()}
    for each, batch in batches.items():
        check(name, kernels[each], forward_products(config, batch))
    numbers = {each: Numbers.of(batch, config) for each, batch in batches.items()}
    kept: dict[str, float] = defaultdict(float)
    for tensor, tower, times in trace(config, batches[1], checkpointing=False).kept.values():
        kept[tower] += size(tensor) * times
    text, vision = config.text_config, config.vision_config
    inputs = numbers[1].tokens * text.num_hidden_layers * text.hidden_size * 4
    inputs += numbers[1].patches * vision.depth * vision.hidden_size * 2
    again = max(kept["language"] / text.num_hidden_layers, kept["visual"] / vision.depth)
    logits = 6 * numbers[1].carried * text.vocab_size
    needs = {each: needed(config, batch) for each, batch in batches.items()}
    everything = sum(kept.values())
    return Traced(
        name, model_of(config), numbers, needs, kernels, everything, inputs + again + kept[""], logits
    )


def plan(
    one: Traced, sharding: str, gpus: int, packs: int, checkpointing: bool, reached: float
) -> dict[str, Any]:
    """Memory and time of one way to train on H200."""
    tokens = one.numbers[packs].tokens
    memory = state_bytes(one.model, sharding, gpus) + one.a_token(checkpointing) * tokens
    forward, backward = (part / reached for part in one.passes(H200, packs, checkpointing))
    seconds, shown = step_seconds(forward, backward, one.model, sharding, gpus, Fabric())
    optimised = one.model.parameters / (1 if sharding == "DDP" else gpus)
    seconds += OPTIMISER_BYTES * optimised / H200.bandwidth / reached
    return {
        "sharding": sharding, "gpus": gpus, "tokens": tokens, "checkpointing": checkpointing,
        "memory_gib": memory / GIB, "fits": memory <= USABLE * H200.memory, "step_seconds": seconds,
        "tokens_per_second_a_gpu": tokens / seconds, "sending": shown / seconds,
        "mfu": one.needed[packs] / H200.bf16 / seconds,
        "rows_per_second_a_gpu": one.numbers[packs].samples / seconds,
    }  # fmt: skip


def longest(one: Traced, sharding: str, gpus: int, checkpointing: bool) -> int:
    """Tokens of a step that a GPU holds; 0 where the states alone do not fit."""
    free = USABLE * H200.memory - state_bytes(one.model, sharding, gpus)
    return max(0, int(free / one.a_token(checkpointing)))


def measured_reach(one: Traced) -> float | None:
    """The share of the bound that a GPU of bench_gpu.py reached, where it ran all layers of a size."""
    path = ROOT / f"benchmarks/results/gpu-{one.name}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["language_layers"] != one.model.layers or not result["tuning"].startswith("full"):
        return None
    workload = result["workloads"]["pictures"]
    seconds = sum(workload["sides"]["ours"]["seconds"]) / len(workload["sides"]["ours"]["seconds"])
    device = H200 if "H200" in result["device"] else H100
    bound = sum(one.passes(device, 1, True)) + OPTIMISER_BYTES * one.model.parameters / device.bandwidth
    return bound * workload["tokens"] / one.numbers[1].tokens / seconds


# Of published figures


@dataclass(frozen=True)
class Published:
    """A row of a published table; full: everything is computed again for the backward pass."""

    name: str
    source: str
    device: Device
    fabric: Fabric
    gpus: int
    sequence: int
    sequences: int
    cost: MultiplyAdds
    model: Model
    full: bool
    tokens_per_second: float
    memory_gib: float | None = None


def dense(hidden: int, inner: int, layers: int, keys: int, vocabulary: int) -> tuple[MultiplyAdds, Model]:
    """A text model whose queries are as wide as its hidden states."""
    layer = hidden * (2 * hidden + 2 * keys + 3 * inner)
    zeros = dict.fromkeys(("patch", "frame_square", "window_square", "merger"), 0.0)
    cost = MultiplyAdds(layers * layer, layers * hidden, hidden * vocabulary, window=0, merge=1, **zeros)
    ends = 2 * hidden * vocabulary
    return cost, Model(layers * layer + ends, layer, ends, layers)


def published() -> list[Published]:
    """The first is the one that REACHED comes from."""
    small, large = dense(4096, 14336, 32, 1024, 128256), dense(8192, 28672, 80, 1024, 128256)
    config: Any = published_config("qwen3_vl_moe", "30B-A3B", nano_tokenizer("qwen3_vl_moe"))
    experts = MultiplyAdds.of(config), model_of(config)
    late = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
    early, nemo = "torchtitan, docs/performance.md of 2024", "NeMo AutoModel, docs/performance-summary.md"
    here, old = Fabric(), Fabric(A100_NVLINK, A100_PORT)
    return [
        Published("Llama 3.1 8B, FSDP", late, H100, here, 8, 8192, 2, *small, False, 5762, 82.4),
        Published("the same", late, H100, here, 128, 8192, 2, *small, False, 5605, 67.0),
        Published("the same, torch.compile", late, H100, here, 8, 8192, 2, *small, False, 6667, 77.0),
        Published("the same, torch.compile", late, H100, here, 128, 8192, 2, *small, False, 6514, 62.0),
        Published("Llama 3 8B, FSDP", early, A100, old, 64, 8192, 1, *small, False, 2973),
        Published("Llama 3 70B, FSDP, all computed again", early, A100, old, 64, 8192, 1, *large, True, 331),
        Published("Qwen3 30B-A3B, experts divided", nemo, H100, here, 8, 4096, 4, *experts, False, 12040),
    ]


def predicted(row: Published, efficiency: float) -> float:
    """Tokens a second and GPU, if arithmetic runs at so much of the peak."""
    lengths = torch.full((row.sequences,), float(row.sequence))
    forward = 2 * float(row.cost.language(lengths, lengths.sum())) / row.device.bf16 / efficiency
    backward = forward * (3 if row.full else 2)
    seconds, _ = step_seconds(forward, backward, row.model, "ZeRO-3", row.gpus, row.fabric)
    return row.sequence * row.sequences / seconds


def calibrated(row: Published) -> float:
    """The efficiency with which the prediction is what was published."""
    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(row, middle) < row.tokens_per_second else (low, middle)
    return high


# The page


def best_plan(plans: list[dict[str, Any]], gpus: int) -> dict[str, Any] | None:
    fitting = [each for each in plans if each["gpus"] == gpus and each["fits"]]
    return max(fitting, key=lambda each: each["tokens_per_second_a_gpu"], default=None)


def way(each: dict[str, Any]) -> str:
    kept = "recomputed" if each["checkpointing"] else "kept"
    return f"{each['sharding']}, {kept}, {each['tokens']:,} tokens"


def published_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        memory = f"{row['memory_gib']:.0f}" if row["memory_gib"] else ""
        error = "set by it" if row["calibrates"] else f"{row['predicted'] / row['published'] - 1:+.0%}"
        numbers = [f"{row[name]:,.0f}" for name in ("published", "predicted")]
        lines.append([row["name"], f"{row['gpus']} {row['device']}", *numbers, error, memory, row["source"]])
    return table(["trained", "GPUs", "tokens/s/GPU", "predicted", "error", "GiB", "source"], lines)


def plans_table(models: list[dict[str, Any]]) -> str:
    rows = []
    for model in models:
        cells = []
        for gpus in GPUS:
            best = best_plan(model["plans"], gpus)
            cells.append(
                f"{best['tokens_per_second_a_gpu']:,.0f} ({best['mfu']:.0%}): {way(best)}"
                if best
                else "does not fit"
            )
        rows.append([model["name"], *cells])
    return table(["tokens/s/GPU (MFU), fastest way", *(f"{gpus:,} H200" for gpus in GPUS)], rows)


def lengths_table(models: list[dict[str, Any]]) -> str:
    rows = []
    for model in models:
        cells = []
        for each in model["plans"]:
            if each["sharding"] == "ZeRO-3" and each["gpus"] == 64 and each["checkpointing"]:
                fits = "" if each["fits"] else " (too large)"
                sends = f"{each['step_seconds']:.2f} s, {each['sending']:.0%} sends"
                cells.append(f"{sends}, {each['memory_gib']:.0f} GiB{fits}")
        rows.append([model["name"], *cells])
    heads = [f"{packs * PACK // 1024}k tokens" for packs in PACKS]
    return table(["ZeRO-3 on 64, recomputed", *heads], rows)


def memory_table(models: list[dict[str, Any]]) -> str:
    rows = []
    for model in models:
        a_token = [f"{model['kib_a_token'][kind]:,.0f}" for kind in ("recomputed", "kept")]
        most = [f"{model['longest'][kind] // 1024:,}k" for kind in ("recomputed", "kept")]
        fewest = [str(model["first_fits"][sharding] or "no") for sharding in SHARDINGS]
        rows.append([model["name"], f"{model['parameters'] / 1e9:.1f}", *a_token, *fewest, *most])
    head = ["", "10^9 parameters", "KiB a token, recomputed", "kept", *(f"{name} from" for name in SHARDINGS),
            "most tokens a GPU, recomputed", "kept"]  # fmt: skip
    return table(head, rows)


def loader_table(models: list[dict[str, Any]], rows_a_core: float) -> str:
    rows = []
    for model in models:
        if best := best_plan(model["plans"], 64):
            asked = best["rows_per_second_a_gpu"]
            rows.append(
                [
                    model["name"],
                    f"{asked:.1f}",
                    f"{asked / rows_a_core:.2f}",
                    f"{8 * rows_a_core / asked:,.0f}x",
                ]
            )
    return table(["64 H200, fastest way", "rows/s/GPU", "cores a GPU", "8 workers can"], rows)


def page(result: dict[str, Any]) -> str:
    """The result in words."""
    models, rows = result["models"], result["published"]
    loader = json.loads((ROOT / "benchmarks/results/data.json").read_text())["rows_per_second"]["ours"]
    measured = [model["name"] for model in models if model["measured"]]
    said = (
        f"{', '.join(measured)}: as measured by bench_gpu.py" if measured else "No GPU has measured it here"
    )
    numbers = models[0]["numbers"]
    return f"""# Training at scale, on paper

**A prediction, not a measurement.** {said}. Every time below rests on one assumption: a step takes
1 / {result["reached"]:.2f} of its lower bound in roofline.md, because that is what a published run of
another model shows (first row below). Written by `benchmarks/scale.py` on {result["date"]}; all numbers:
scale.json; formulas: its module text.

Packs of pictures as in `bench_gpu.py`, {numbers["tokens"]:,} tokens of {numbers["samples"]} rows in 4k, the
same samples in 16k (4 packs a step) and 32k (8). Everything is trained. H200: 989 x 10^12 operations a
second, 4.8 TB/s, 141 GB, of which {USABLE:.0%} can be used; 900 GB/s of NVLink in nodes of {NODE}, 400 Gb/s
for each GPU between them.

## Against published figures

One number is fitted to the first row: arithmetic at {result["efficiency"]:.0%} of the peak. The others
follow from it.

{published_table(rows)}
What the errors say: the step from 8 to 128 GPUs is met to a few hundredths, so what is sent and hidden is
about right. Compiled elementwise kernels are faster than the fitted eager ones. Both rows on A100 are far
off: it has a third of the arithmetic but more than half of the bandwidth, so it most likely reaches a
larger share of its peak than one number for all GPUs can say. In the last row each GPU holds an eighth of
the experts and tokens travel; the formula gathers weights instead, as ZeRO-3 does. The H100 of torchtitan
had slower memory (2.4 TB/s) and 500 W, so the fitted number is rather low for an H200.

Memory: from 8 to 128 GPUs {result["memory_saved"]["published"]:.1f} GiB less were published (eager),
{result["memory_saved"]["predicted"]:.1f} are predicted (16 bytes a parameter there, no bf16 copies).

## Where a model fits

{memory_table(models)}
*From*: the fewest of {", ".join(f"{gpus:,}" for gpus in (1, *GPUS))} GPUs on which a pack of 4k tokens fits
with gradient checkpointing. KiB a token: activations with the logits' gradients, counted from what a step
keeps. *Kept*: without checkpointing. *Most tokens* under ZeRO-3 on 64 GPUs.

## How fast

{plans_table(models)}
Fastest of DDP, ZeRO-2 and ZeRO-3, 4k, 16k and 32k tokens a GPU, with (recomputed) and without (kept) gradient
checkpointing. How the length of a step matters:

{lengths_table(models)}
*Sends*: share of the step in which a GPU only waits for weights or gradients. A mixture of experts has the
weights of all of its experts to send and the arithmetic of a few: it wants many tokens a GPU, or experts
divided over GPUs, which this repository does not do.

## The loader

`bench_data.py` measured {loader:.0f} rows a second and core (data.json). Needed at the speeds above:

{loader_table(models, loader)}
Rows of larger pictures cost more on both sides; videos are not counted.
"""


def report_of(one: Traced, assumed: float) -> dict[str, Any]:
    """All numbers of one size."""
    measured = measured_reach(one)
    reached = measured or assumed
    plans = [
        plan(one, sharding, gpus, packs, checkpointing, reached)
        for sharding in SHARDINGS
        for gpus in GPUS
        for packs in one.numbers
        for checkpointing in (True, False)
    ]
    fewest = {
        sharding: next((gpus for gpus in (1, *GPUS) if longest(one, sharding, gpus, True) >= PACK), None)
        for sharding in SHARDINGS
    }
    return {
        "name": one.name, "parameters": one.model.parameters, "measured": measured, "reached": reached,
        "numbers": dataclasses.asdict(one.numbers[1]), "first_fits": fewest,
        "kib_a_token": {"recomputed": one.a_token(True) / 1024, "kept": one.a_token(False) / 1024},
        "longest": {
            kind: longest(one, "ZeRO-3", 64, kind == "recomputed") for kind in ("recomputed", "kept")
        },
        "plans": plans,
    }  # fmt: skip


def published_report(rows: list[Published], efficiency: float) -> list[dict[str, Any]]:
    return [
        {
            "name": row.name, "source": row.source, "device": row.device.name, "gpus": row.gpus,
            "published": row.tokens_per_second, "predicted": predicted(row, efficiency),
            "memory_gib": row.memory_gib, "calibrates": row is rows[0],
        }
        for row in rows
    ]  # fmt: skip


def reach(one: Traced, efficiency: float) -> float:
    """The share of its bound at which a step of this size on H100 runs with that efficiency.

    Nothing is computed again, and there are 16k tokens, as nearly in the published run.
    """
    packs = max(each for each in one.numbers if each <= 4)
    bound = sum(one.passes(H100, packs, False))
    return efficiency * H100.bf16 * bound / one.needed[packs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2B, one pack: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/scale.json")
    options = parser.parse_args()
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/scale.json")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = provenance("torch", "transformers")
    sizes = [traced("2B", (1,))] if options.quick else [traced(name, PACKS) for name in MODELS]
    rows = published()
    efficiency = calibrated(rows[0])
    like = next((one for one in sizes if one.name == "8B"), sizes[0])
    assumed = reach(like, efficiency)
    few, many = rows[:2]
    assert few.memory_gib and many.memory_gib
    saved = 16 * few.model.parameters * (1 / few.gpus - 1 / many.gpus) / GIB
    result |= {
        "efficiency": efficiency, "reached": assumed, "published": published_report(rows, efficiency),
        "memory_saved": {"published": few.memory_gib - many.memory_gib, "predicted": saved},
        "models": [report_of(one, assumed) for one in sizes],
    }  # fmt: skip
    for model in result["models"]:
        if best := best_plan(model["plans"], 64):
            rate = best["tokens_per_second_a_gpu"]
            print(f"{model['name']:9} {rate:7,.0f} tokens/s/GPU on 64 H200: {way(best)}")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        output.with_suffix(".md").write_text(page(result))
        print(f"written: {output}")


if __name__ == "__main__":
    main()
