"""Where the time of a training step goes at least, by data sheet: no GPU is needed, and none was.

    .venv/bin/python benchmarks/roofline.py [--quick] [--output FILE]

    geometry of each size of bench_gpu.py, a pack of pictures --trace--> kernels
      --products counted = qwenvl.data.flops?--> seconds at least of each kind, H100 and H200
      -> ceiling of the MFU, and what each lever would take away

Results go to benchmarks/results/roofline.json, as a page to roofline.md beside it. --quick: the nano
geometry, only where --output says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from bench_gpu import SIZES, geometry, steps_of, whole_losses
from provenance import provenance
from step_trace import PRODUCTS, WEIGHT_CASTS, Device, Kernel, Numbers, trace

from qwenvl.data.collators import FlattenedCollator
from qwenvl.data.flops import MultiplyAdds
from qwenvl.nano.architecture import random_model
from qwenvl.train.trainer import token_losses

ROOT = Path(__file__).resolve().parents[1]
# The vendor's data sheets: dense bf16, fp32 without tensor cores, HBM3 and HBM3e.
H100 = Device("H100", 989e12, 67e12, 3.35e12, 80e9)
H200 = Device("H200", 989e12, 67e12, 4.8e12, 141e9)
PACK, LARGE = 4096, 4  # Tokens at most; packs of a large step.
# AdamW reads weight, gradient and both moments and writes all but the gradient; clipping reads the gradient,
# then reads and writes it again. All in fp32.
OPTIMISER_BYTES = (7 + 3) * 4
TOLERANCE = 0.01
LAUNCH = 5e-6  # Seconds that Python takes to start a kernel: an assumption.
# Of a table, in its order: name and kinds.
GROUPS: dict[str, tuple[str, ...]] = {
    "matrix products": tuple(PRODUCTS + tower for tower in ("language", "vision", "merger", "lm_head")),
    "attention": ("attention",),
    "norms": ("norms",),
    "rotary, heads": ("rotary and heads",),
    "activations": ("activations",),
    "residuals": ("residuals",),
    "casts of activations": ("casts of activations",),
    "casts of weights": (WEIGHT_CASTS,),
    "cross-entropy": ("loss",),
    "other": ("embeddings", "bias gradients", "routing"),
}
# What one kernel could do in the place of many.
FUSED = ("norms", "rotary and heads", "activations", "residuals", "casts of activations")


@dataclass(frozen=True)
class Step:
    """One optimiser step of a size on one device; needed: operations as `qwenvl.train.metering` counts."""

    size: str
    config: Any
    parameters: int
    numbers: Numbers
    needed: float
    kernels: list[Kernel]

    def optimiser(self, device: Device) -> float:
        """Seconds of clipping and of AdamW."""
        return self.parameters * OPTIMISER_BYTES / device.bandwidth

    def seconds(self, device: Device, kernels: Iterable[Kernel] | None = None) -> float:
        """All of the step at least; of other kernels where given."""
        counted = self.kernels if kernels is None else kernels
        return sum(kernel.floor(device) for kernel in counted) + self.optimiser(device)

    def ceiling(self, device: Device, seconds: float) -> float:
        """The MFU of a step of so many seconds."""
        return self.needed / device.bf16 / seconds


def pack_of(config: Any, packs: int) -> dict[str, Any]:
    """So many packs of pictures of bench_gpu.py, of up to 4,096 tokens, as one batch."""
    return FlattenedCollator()(list(chain.from_iterable(steps_of("pictures", config, PACK, packs))))


def forward_operations(cost: MultiplyAdds, batch: dict[str, Any]) -> float:
    carried = (batch["labels"][:, 1:] != -100).sum()
    vision = sum(cost.vision(batch["image_grid_thw"]))
    return 2 * float(cost.language(batch["cu_seq_lens_q"].diff(), carried) + vision)


def forward_products(config: Any, batch: dict[str, Any]) -> float:
    """Operations of one forward pass by `qwenvl.data.flops`, attention left out."""
    cost = dataclasses.replace(MultiplyAdds.of(config), square=0, frame_square=0, window_square=0)
    return forward_operations(cost, batch)


def needed(config: Any, batch: dict[str, Any]) -> float:
    """Operations of a step in which everything is trained: those of the forward pass three times."""
    return 3 * forward_operations(MultiplyAdds.of(config), batch)


def check(name: str, kernels: Iterable[Kernel], expected: float) -> float:
    """How far the matrix products counted are from the formula; ends the program where that is too far."""
    products = (kernel for kernel in kernels if kernel.kind.startswith(PRODUCTS))
    counted = sum(kernel.times * kernel.operations for kernel in products if kernel.moment == "forward")
    if not abs(counted / expected - 1) <= TOLERANCE:
        sys.exit(f"{name}: {counted:.4g} operations counted, {expected:.4g} by formula: nothing is reported")
    return counted / expected - 1


def step_of(size: str, config: Any, packs: int, *, losses: Callable[..., Any] = token_losses) -> Step:
    batch = pack_of(config, packs)
    kernels = trace(config, batch, checkpointing=True, losses=losses).kernels
    if losses is token_losses:  # The formula has the logits of the answers alone.
        check(size, kernels, forward_products(config, batch))
    meta = random_model(config, device="meta", dtype=torch.float32, seed=0)
    parameters = sum(weight.numel() for weight in meta.parameters())
    return Step(size, config, parameters, Numbers.of(batch, config), needed(config, batch), kernels)


def fused(step: Step, kernels: Iterable[Kernel]) -> list[Kernel]:
    """The same with each stretch between two matrix products as one kernel, in bf16.

    Values a token and layer of the language model: two norms with the residual before them (read and write
    both), norm and rotation of queries and keys, gate, up and product; of the tower alike. The backward pass
    moves twice as many.
    """
    text, vision = step.config.text_config, step.config.vision_config
    inner = text.intermediate_size
    if experts := getattr(text, "num_experts_per_tok", 0):
        inner = experts * text.moe_intermediate_size
    rotated = (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    token = text.num_hidden_layers * (8 * text.hidden_size + 2 * rotated + 3 * inner)
    patch_ = vision.depth * (12 * vision.hidden_size + 2 * vision.intermediate_size)
    moved = 2 * (step.numbers.tokens * token + step.numbers.patches * patch_)
    rest = [kernel for kernel in kernels if kernel.kind not in FUSED]
    weight = {"forward": 1, "recomputed": 1, "backward": 2}
    moments = {kernel.moment for kernel in rest}
    return rest + [
        Kernel(moment, "fused", "fused", 0.0, weight[moment] * moved, False, 1) for moment in sorted(moments)
    ]


def stored(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Without gradient checkpointing."""
    return [kernel for kernel in kernels if kernel.moment != "recomputed"]


def without_casts(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Weights are kept in bf16, beside those that the optimiser has."""
    return [kernel for kernel in kernels if kernel.kind != WEIGHT_CASTS]


def levers(step: Step, large: Step, device: Device) -> dict[str, dict[str, float]]:
    """Of each lever by itself the milliseconds that it takes away, and the ceiling with it."""
    now = step.seconds(device)
    changes: dict[str, Callable[[list[Kernel]], list[Kernel]]] = {
        "elementwise kernels fused": lambda kernels: fused(step, kernels),
        "no gradient checkpointing": stored,
        "weights kept in bf16": without_casts,
    }
    found = {}
    for name, change in changes.items():
        seconds = step.seconds(device, change(step.kernels))
        found[name] = {"ms": 1e3 * (now - seconds), "ceiling": step.ceiling(device, seconds)}
    per_token = large.seconds(device) / large.numbers.tokens * step.numbers.tokens
    found[f"packs of {LARGE * PACK:,} tokens"] = {
        "ms": 1e3 * (now - per_token), "ceiling": large.ceiling(device, large.seconds(device))
    }  # fmt: skip
    every = large.seconds(device, without_casts(stored(fused(large, large.kernels))))
    found["all of them"] = {
        "ms": 1e3 * (now - every / large.numbers.tokens * step.numbers.tokens),
        "ceiling": large.ceiling(device, every),
    }
    return found


def grouped(kernels: Iterable[Kernel], device: Device) -> dict[str, dict[str, float]]:
    """Milliseconds at least by group and pass."""
    found: dict[str, dict[str, float]] = {name: defaultdict(float) for name in GROUPS}
    for kernel in kernels:
        group = next((name for name, kinds in GROUPS.items() if kernel.kind in kinds), None)
        if group:
            found[group][kernel.moment] += 1e3 * kernel.floor(device)
    return found


def report_of(size: str, config: Any) -> dict[str, Any]:
    """All numbers of one size."""
    step, large = step_of(size, config, 1), step_of(size, config, LARGE)
    whole = step_of(size, config, 1, losses=whole_losses)
    embedding = config.vision_config.hidden_size * 1536 * step.numbers.patches * 2
    report: dict[str, Any] = {
        "size": size, "parameters": step.parameters, "numbers": dataclasses.asdict(step.numbers),
        "needed_operations": step.needed, "kernels": sum(kernel.times for kernel in step.kernels),
        "patch_embedding_ms": 1e3 * 2 * embedding / H200.bf16, "devices": {},
    }  # fmt: skip
    for device in (H100, H200):
        seconds = step.seconds(device)
        report["devices"][device.name] = {
            "ms": 1e3 * seconds, "optimiser_ms": 1e3 * step.optimiser(device),
            "ceiling": step.ceiling(device, seconds), "groups_ms": grouped(step.kernels, device),
            "levers": levers(step, large, device),
            "all_logits_ms": 1e3 * (whole.seconds(device) - seconds),
        }  # fmt: skip
    return report


# The page


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kinds_table(sizes: dict[str, Any], device: str) -> str:
    rows = []
    for group in GROUPS:
        spent = [sum(one["devices"][device]["groups_ms"][group].values()) for one in sizes.values()]
        rows.append([group, *(f"{ms:.1f}" for ms in spent)])
    parts = [one["devices"][device] for one in sizes.values()]
    rows.append(["AdamW, clipping", *(f"{part['optimiser_ms']:.1f}" for part in parts)])
    rows.append(["**all**", *(f"**{part['ms']:.0f}**" for part in parts)])
    rows.append(["**ceiling of the MFU**", *(f"**{part['ceiling']:.0%}**" for part in parts)])
    rows.append(["kernels", *(f"{one['kernels']:,}" for one in sizes.values())])
    return table([f"milliseconds, {device}", *sizes], rows)


def levers_table(sizes: dict[str, Any], device: str) -> str:
    parts = [one["devices"][device] for one in sizes.values()]
    rows = []
    for lever in parts[0]["levers"]:
        found = [part["levers"][lever] for part in parts]
        rows.append([lever, *(f"{one['ms']:+.0f} ms, {one['ceiling']:.0%}" for one in found)])
    head = [f"off the step of {device}, ceiling then", *sizes]
    rows.append(["logits of all tokens again", *(f"{-part['all_logits_ms']:+.0f} ms" for part in parts)])
    return table(head, rows)


def largest(sizes: dict[str, Any]) -> str:
    """The lever of each size that takes most away by itself."""
    found = []
    for size, one in sizes.items():
        single = {name: lever["ms"] for name, lever in one["devices"]["H200"]["levers"].items()}
        del single["all of them"]
        name = max(single, key=lambda each: single[each])
        found.append(f"{size} {name} ({single[name] / one['devices']['H200']['ms']:.0%} of the step)")
    return ", ".join(found)


def page(result: dict[str, Any]) -> str:
    """The result in words."""
    sizes = {one["size"]: one for one in result["sizes"]}
    numbers = result["sizes"][0]["numbers"]
    embedding = max(one["patch_embedding_ms"] for one in result["sizes"])
    starting = ", ".join(f"{one['kernels'] * LAUNCH * 1e3:.0f} ms ({size})" for size, one in sizes.items())
    return f"""# Roofline of a training step

**No GPU measured any of this.** These are lower bounds: the kernels of one step, counted from the code as
it is, each at the speed of a data sheet: 989 x 10^12 operations a second in bf16 and 67 in fp32, 3.35 TB/s
(H100) or 4.8 TB/s (H200). What a kernel takes beyond its bound, and what starting it takes, comes on top.
Written by `benchmarks/roofline.py` on {result["date"]}; all numbers: roofline.json.

The step: one pack of pictures as `bench_gpu.py` has them, {numbers["tokens"]:,} tokens of
{numbers["samples"]} samples, {numbers["patches"]:,} patches, {numbers["carried"]:,} tokens with loss. All
weights are trained, fp32 under autocast to bf16, with gradient checkpointing, logits at the answers,
fused AdamW. 30B-A3B has four of its 48 layers. The matrix products counted are those of
`qwenvl.data.flops` to within {TOLERANCE:.0%}, else nothing is written.

What is worth most by itself, on H200: {largest(sizes)}.

## Where the time goes

{kinds_table(sizes, "H200")}
{kinds_table(sizes, "H100")}
The ceiling is the MFU, by the operations that the model needs, of a step in which every kernel runs at its
bound. Each number holds forward, backward and what checkpointing computes again. *Activations* of a mixture
of experts hold the sorting of tokens to experts too. At {LAUNCH * 1e6:.0f} microseconds a kernel, which is an
assumption, Python takes {starting} to start them:
where that is more than the bound, the GPU waits for Python.

## What each lever is worth

{levers_table(sizes, "H200")}
{levers_table(sizes, "H100")}
- **Fused**: a norm with its residual, a rotation, a gate as one kernel each in bf16, as Liger or
  torch.compile make them; counted by formula.
- **No gradient checkpointing**: where memory allows, see scale.md.
- **Larger packs**: the same samples, four times as many a step, in milliseconds for as many tokens. The
  optimiser and the casts of weights are paid once a step.
- **All logits again**: what computing logits at answers alone saves now.
- **Conv3d** has the operations of the linear patch embedding, {embedding:.1f} ms of a step at most. A
  roofline can't see how slow a kernel is: eight times as slow, as on a CPU, it would cost
  {7 * embedding:.1f} ms.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="nano geometry: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/roofline.json")
    options = parser.parse_args()
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/roofline.json")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = provenance("torch", "transformers") | {
        "devices": [dataclasses.asdict(one) for one in (H100, H200)]
    }
    configs = {"nano": geometry(None)} if options.quick else {size: geometry(size) for size in SIZES}
    result["sizes"] = [report_of(size, config) for size, config in configs.items()]
    for one in result["sizes"]:
        part = one["devices"]["H200"]
        print(f"{one['size']:8} H200: at least {part['ms']:.0f} ms, MFU at most {part['ceiling']:.0%}")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        output.with_suffix(".md").write_text(page(result))
        print(f"written: {output}")


if __name__ == "__main__":
    main()
