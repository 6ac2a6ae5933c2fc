"""Training the small model on this machine's cores: the quickstart's training against a plain loop.

    .venv/bin/python benchmarks/bench_cpu.py [--rounds 3] [--quick] [--output FILE]

    the quickstart's conversations, 32 a step, one order for all sides
      plain   one process with all cores: the model library's model, fp32, padded, its own loss, AdamW
      ours    torchrun, a process a core: train_qwen.py by its defaults, the plain loop's rate
      muon    the same with the quickstart's --muon and rate
    losses of plain and ours step by step equal? --> rounds, alternating --> ratios

The plain loop gets batches that are ready; ours reads, decodes and encodes its rows in the time that is
measured. What is timed begins after the first SKIP steps. `loss_reached` compares optimisers: the steps
that muon needs for the mean loss of plain's last ten. Goal: 2 times the conversations a second. Results go to
benchmarks/results/cpu.json; with --quick only where --output says.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from transformers import AutoModelForImageTextToText, HfArgumentParser

from qwen_vl_utils import scale_pixels
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.speed import bf16_hardware
from qwenvl.train.train_qwen import build_trainer

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/qwen3-vl-nano"
sys.path.insert(0, str(ROOT / "qwen-vl-finetune/demo"))
import quickstart  # noqa: E402

GOAL = 2.0
BATCH = 32
RATE = 1e-3
SKIP = 5  # The first steps allocate memory and choose kernels.
# How far apart a step's losses may be, relative: later steps carry on what earlier ones rounded.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
Batch = dict[str, Any]
Run = tuple[list[float], float]  # The loss of each step, conversations a second.


def flags(folder: Path, output: str, steps: int, **more: Any) -> dict[str, Any]:
    """The quickstart's, but that the rate is constant and every step is logged."""
    return quickstart.TRAINING_FLAGS | {
        "model_name_or_path": MODEL, "dataset_config": folder / "data/datasets.toml",
        "dataset_use": "easy_vqa", "output_dir": folder / output, "max_steps": steps, "save_strategy": "no",
        "logging_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0, "disable_tqdm": True,
    } | more  # fmt: skip


def padded_batches(folder: Path, steps: int) -> list[Batch]:
    """What train_qwen.py trains on, 32 conversations to a padded batch, as the model library takes it."""
    kinds: Any = (ModelArguments, DataArguments, TrainingArguments)
    given = flags(folder, "rows", steps, data_flatten=False, per_device_train_batch_size=BATCH)
    trainer = build_trainer(*HfArgumentParser(kinds).parse_args_into_dataclasses(quickstart.as_flags(given)))
    image = trainer.model.config.image_token_id
    batches = []
    for batch in trainer.get_train_dataloader():
        inputs = scale_pixels(batch, trainer.processor)
        for ours in ("position_ids", "dataset"):
            del inputs[ours]
        batches.append(inputs | {"mm_token_type_ids": (inputs["input_ids"] == image).long()})
        if len(batches) == steps:
            break
    return batches


def plain(batches: list[Batch]) -> Run:
    """A loop as one writes it."""
    model: Any = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses, began = [], 0.0
    for step, batch in enumerate(batches):
        if step == SKIP:
            began = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, (len(batches) - SKIP) * BATCH / (time.perf_counter() - began)


def ours(folder: Path, steps: int, **more: Any) -> Run:
    """The training script as the quickstart starts it."""
    size = BATCH // quickstart.training_processes()
    command, threads = quickstart.training_command(
        flags(folder, "out", steps, per_device_train_batch_size=size, **more)
    )
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"training failed: {done.stderr[-2000:]}")
    print(next(line for line in done.stderr.splitlines() if line.startswith("speed: ")), flush=True)
    lines = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    lines = [line for line in lines if "loss" in line]
    seconds = sum(BATCH / line["samples_per_second"] for line in lines[SKIP:])
    return [line["loss"] for line in lines], (steps - SKIP) * BATCH / seconds


def check(expected: list[float], found: list[float]) -> None:
    tolerance = TOLERANCE["bf16" if bf16_hardware("cpu") else "fp32"]
    for step, (one, other) in enumerate(zip(expected, found, strict=True), 1):
        if not abs(one - other) <= tolerance * one:
            sys.exit(f"step {step}: the plain loop's loss is {one}, ours {other}: nothing is reported")


def steps_to(loss: float, curve: list[float]) -> int | None:
    """The first step from which ten together are no worse than `loss`."""
    means = (statistics.mean(curve[at : at + 10]) for at in range(len(curve) - 9))
    return next((at + 10 for at, mean in enumerate(means) if mean <= loss), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1 round of 6 steps without muon: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu.json")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rounds, steps = (1, SKIP + 1) if options.quick else (options.rounds, 40)
    result = provenance("torch", "transformers", "accelerate")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        quickstart.convert(folder / "data", 1)
        batches = padded_batches(folder, steps)
        no_muon = {"muon": False, "learning_rate": RATE, "weight_decay": 0.0}
        sides: dict[str, Callable[[], Run]] = {
            "plain": lambda: plain(batches),
            "ours": lambda: ours(folder, steps, **no_muon),
            "muon": lambda: ours(folder, steps),
        }
        if options.quick:
            del sides["muon"]
        runs: dict[str, list[Run]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sorted(sides, reverse=number % 2 == 0):
                runs[side].append(sides[side]())
            check(runs["plain"][-1][0], runs["ours"][-1][0])
    curves = {side: of[0][0] for side, of in runs.items()}
    speeds = {side: [speed for _, speed in of] for side, of in runs.items()}
    result |= {
        "bf16": bf16_hardware("cpu"), "rounds": rounds, "steps": steps, "goal": GOAL,
        "conversations_per_second": {side: statistics.median(each) for side, each in speeds.items()},
        "ratio": {side: spread(speeds["plain"], speeds[side]) for side in speeds if side != "plain"},
        "losses": curves,
    }  # fmt: skip
    print(f"{steps} steps of {BATCH} conversations; losses of plain and ours equal at each step")
    for side, speed in result["conversations_per_second"].items():
        ratio = result["ratio"].get(side)
        times = f"  {ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})" if ratio else ""
        print(f"  {side:6} {speed:6.1f} conversations/s{times}, last loss {curves[side][-1]:.4f}")
    if "muon" in curves:
        reached = steps_to(statistics.mean(curves["plain"][-10:]), curves["muon"])
        result["loss_reached"] = {"plain": steps, "muon": reached}
        print(f"  plain's loss of the last ten steps: muon has it after {reached} steps of {steps}")
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/cpu.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


def spread(base: list[float], faster: list[float]) -> dict[str, float]:
    """How many times faster, over the rounds."""
    ratios = sorted(b / a for a, b in zip(base, faster, strict=True))
    return {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


if __name__ == "__main__":
    main()
