"""A training step on one GPU at published sizes: ours against the plain Trainer and flattening alone.

    .venv/bin/python benchmarks/bench_gpu.py --size 4B [--rounds 3] [--peak_tflops N] [--output FILE]
    .venv/bin/python benchmarks/bench_gpu.py --smoke [--output FILE]

    geometry of the size -> random weights on the device -> one model, which all sides share
    seed -> pictures, text, video: encoded samples, 4,096 tokens a step
      plain   transformers' Trainer: padded, its own loss over all positions, sdpa, Conv3d
      flat    QwenVLTrainer, flattened, without LEVERS: sdpa with a block mask, all logits, Conv3d
      ours    QwenVLTrainer as train_qwen.py sets it up;  and the same without each lever by itself
      --mean loss a token of the first weights equal in all?--> rounds, alternating --> ratios
    ours, one step under torch.profiler -> time by kind of kernel

Weights are fp32 and computed with in bf16 (--bf16 of train_qwen.py). All sides have gradient checkpointing
and the fused AdamW, which is the plain Trainer's default. All weights are tuned where an estimate of the
memory says that they fit, else LoRA adapters on all components. What is timed is forward, backward, clipping
and the optimiser inside `Trainer.train()`; the first epoch warms up. Where a way runs out of memory the
result says so. Operations are those that the model needs (`qwenvl.train.metering`): padding and recomputing
do not count.

With random weights the mean loss says little about what a token attends to. So the token losses of flat and
ours are compared too: their root mean square difference as a share of the spread of ours. --smoke runs
everything on the CPU at nano size in fp32, eight tokens' logits a piece; its times mean nothing. Results go
to benchmarks/results/gpu-SIZE.json; with --smoke only where --output says.
"""

import argparse
import io
import json
import logging
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from provenance import provenance
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser, PreTrainedConfig, Trainer, TrainerCallback
from transformers import TrainingArguments as PlainArguments

from qwen_vl_utils import scale_pixels
from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.rope2d import RopeIndex
from qwenvl.nano.architecture import build_processor, nano_config, published_config, random_model
from qwenvl.nano.tokenizer import nano_tokenizer
from qwenvl.train import attention, linear_cross_entropy, model_loading
from qwenvl.train import trainer as ours_module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.metering import GIB, TokenLosses, Work, count_loss_tokens
from qwenvl.train.train_qwen import build_trainer
from qwenvl.train.trainer import QwenVLTrainer, model_inputs

ROOT = Path(__file__).resolve().parents[1]
# Size -> family and layers of the language model; None: all of them.
SIZES = {
    "2B": ("qwen3_vl", None),
    "4B": ("qwen3_vl", None),
    "8B": ("qwen3_vl", None),
    "30B-A3B": ("qwen3_vl_moe", 4),
}
# 10^12 dense bf16 operations a second by torch.cuda.get_device_name, from the vendor's data sheets.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0, "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
}  # fmt: skip
# How far apart mean losses may be, relative, and token losses, as a share of their spread. At nano size in
# bf16 they are apart by 2e-4 and 0.01, with borders between samples off by one token 3e-4 to 7e-4 and 0.13 to
# 0.32, without borders 1e-3 to 2e-3 and 0.4 to 1.0; a deep model adds up more rounding than a nano one.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 0.1)}
# The first kind whose pattern a kernel's name has, in small letters, is its kind.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "optimiser": r"adam|multi_tensor|optimizer|foreach",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|mm$|convol|conv3d|fprop|dgrad|wgrad",
    "copies and casts": r"copy|memcpy|memset|catarray|aten::(cat|contiguous|clone)",
    "elementwise": r"elementwise|reduce|norm|moments|gammabeta|softmax|index|scatter|gather|"
    r"aten::(add|mul|div|sub|pow|sum|mean|silu|gelu|neg|fill_|zero_|where|nll_loss)",
}
Item = dict[str, torch.Tensor]


def whole_losses(model: nn.Module, inputs: dict[str, Any]) -> TokenLosses:
    """`token_losses` from the logits of all positions, as the model library's own loss has them."""
    labels = inputs["labels"]
    outputs = model(**model_inputs(inputs), use_cache=False)
    targets = pad(labels, (0, 1), value=-100)[:, 1:]
    logits = outputs.logits.flatten(0, 1).float()
    losses = cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
    columns = torch.arange(labels.shape[1] - 1, device=labels.device)
    return TokenLosses(losses.view(labels.shape)[:, :-1], columns, outputs)


@contextmanager
def convolution(trainer: Trainer) -> Iterator[None]:
    """The patch embedding is the model library's Conv3d again, with the same weights."""
    assert trainer.model is not None
    modules = trainer.model.named_modules()
    embedding: Any = next(module for name, module in modules if name.endswith("visual.patch_embed"))
    linear = embedding.proj
    width, channels, *kernel = linear.weight.shape
    conv = nn.Conv3d(channels, width, tuple(kernel), stride=tuple(kernel), device="meta")
    conv.weight, conv.bias = linear.weight, linear.bias
    embedding.proj = conv
    try:
        yield
    finally:
        embedding.proj = linear


def stored_activations(trainer: Trainer) -> AbstractContextManager:
    model: Any = trainer.model
    model.gradient_checkpointing_disable()  # The Trainer only ever turns it on.
    return patch.object(trainer.args, "gradient_checkpointing", False)


# What each is switched off by; the first three are what ours has over flat, whose logits are whole too.
LEVERS: dict[str, Callable[[Any], AbstractContextManager]] = {
    "varlen attention": lambda trainer: attention.suspended(trainer.model.config),
    "linear patch embedding": convolution,
    "logits at answers only": lambda _: patch.object(ours_module, "token_losses", whole_losses),
    "loss in pieces": lambda _: patch.object(linear_cross_entropy, "PIECE_BYTES", sys.maxsize),
    "fused optimiser": lambda trainer: patch.object(trainer.args, "optim", "adamw_torch"),
    "gradient checkpointing": stored_activations,
}


@dataclass(frozen=True)
class Way:
    """One way to train: whose trainer, and the levers that are off."""

    plain: bool = False
    off: tuple[str, ...] = ()


WAYS = {
    "plain": Way(plain=True, off=("varlen attention", "linear patch embedding")),
    "flat": Way(off=("varlen attention", "linear patch embedding", "logits at answers only")),
    "ours": Way(),
} | {lever: Way(off=(lever,)) for lever in LEVERS}
SIDES = ("plain", "flat", "ours")


def sample(kind: str, config: Any, budget: int, random: np.random.Generator) -> Item:
    """An encoded sample; its sizes are shares of the tokens of a step, so that nano steps look alike."""
    ids: list[int] = []
    grids = []
    side = math.isqrt(budget) // 2

    def medium(token: int, height: int, width: int) -> None:
        pads = [token] * (height * width)
        ids.extend([config.vision_start_token_id, *pads, config.vision_end_token_id])

    def text(least: int, most: int) -> list[int]:
        # Below 1000 there are no special tokens.
        return random.integers(0, 1000, random.integers(least, most)).tolist()

    if kind == "pictures":
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            height, width = random.integers(side // 4, side, 2).tolist()
            medium(config.image_token_id, height, width)
            grids.append([1, 2 * height, 2 * width])
    if kind == "video":
        moments = int(random.integers(4, 9))
        height, width = random.integers(side // 4, side // 2, 2).tolist()
        for _ in range(moments):
            ids += text(3, 6)  # Stands for the written time of the frames.
            medium(config.video_token_id, height, width)
        grids.append([moments, 2 * height, 2 * width])
    ids += text(budget // 64, budget // 4) if kind == "text" else text(budget // 128, budget // 32)
    answer = text(budget // 64, budget // 4) if kind == "text" else text(budget // 256, budget // 16)
    vision = config.vision_config
    dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    media: Item = {}
    if grids:
        patches = sum(math.prod(grid) for grid in grids)
        pixels = torch.from_numpy(random.integers(0, 256, (patches, dim), dtype=np.uint8))
        ends = ("_videos", "video") if kind == "video" else ("", "image")
        media = {f"pixel_values{ends[0]}": pixels, f"{ends[1]}_grid_thw": torch.tensor(grids)}
    row = torch.tensor(ids + answer)
    positions = RopeIndex.from_config(config)(
        row[None], media.get("image_grid_thw"), media.get("video_grid_thw")
    )
    return media | {
        "input_ids": row,
        "labels": torch.where(torch.arange(len(row)) < len(ids), -100, row),
        "position_ids": positions[:, 0],
        "segment_lengths": torch.tensor([len(row)]),
    }


def steps_of(kind: str, config: Any, budget: int, count: int) -> list[list[Item]]:
    """The samples of `count` steps, each as many as fit."""
    random = np.random.default_rng(0)
    batches: list[list[Item]] = [[]]
    while True:
        item = sample(kind, config, budget, random)
        if sum(len(other["input_ids"]) for other in batches[-1]) + len(item["input_ids"]) > budget:
            if len(batches) == count:
                return batches
            batches.append([])
        batches[-1].append(item)


def padded_tokens(batch: list[Item]) -> int:
    return len(batch) * max(len(item["input_ids"]) for item in batch)


def choose_tuning(parameters: int, vocabulary: int, widest: int, free: int) -> tuple[bool, str]:
    """Whether LoRA, and why: weights fp32 and bf16, gradients and AdamW's moments fp32, and the largest
    activation, plain's logits in bf16 and fp32 with their loss and gradient.
    """
    logits = widest * vocabulary * (2 + 4 + 4 + 4)
    full, adapters = (parameters * each + logits for each in (4 + 2 + 4 + 8, 4 + 2))
    usable = 0.9 * free  # The rest is for other activations and for what the allocator can't use.
    sizes = (
        f"{full / GIB:.0f} GiB to tune all weights, {adapters / GIB:.0f} with LoRA, {usable / GIB:.0f} usable"
    )
    if adapters > usable:
        sys.exit(f"bench_gpu: too large for this device by estimate: {sizes}")
    lora = full > usable
    return lora, f"{'LoRA' if lora else 'full tuning'}: by estimate {sizes}"


def build_ours(folder: Path, config: PreTrainedConfig, *, device: str, lora: bool) -> QwenVLTrainer:
    """What train_qwen.py builds, around random weights on the device instead of a checkpoint's."""
    tokenizer = nano_tokenizer(config.model_type)
    config.save_pretrained(folder)
    build_processor(config.model_type, tokenizer).save_pretrained(folder)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    (folder / "rows.json").write_text(json.dumps([{"conversations": turns}]))
    (folder / "data.toml").write_text('[rows]\nannotation_path = "rows.json"\n')
    flags = ["--model_name_or_path", str(folder), "--dataset_config", str(folder / "data.toml")]
    flags += ["--dataset_use", "rows", "--data_flatten", "True", "--lora_enable", str(lora)]
    flags += ["--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--tune_mm_vision", "True"]
    for name, value in shared_arguments(folder, device).items():
        flags += [f"--{name}", str(value)]
    kinds: Any = (ModelArguments, DataArguments, TrainingArguments)

    def from_pretrained(path: str, *, config: PreTrainedConfig, dtype: torch.dtype, **_: Any) -> Any:
        return random_model(config, device=device, dtype=dtype, seed=0)

    loader = SimpleNamespace(from_pretrained=from_pretrained)
    parsed: Any = HfArgumentParser(kinds).parse_args_into_dataclasses(flags)
    with patch.object(model_loading, "AutoModelForImageTextToText", loader):
        return build_trainer(*parsed)


def shared_arguments(folder: Path, device: str) -> dict[str, Any]:
    """Of both trainers; the second of the epochs is timed."""
    return dict(
        output_dir=str(folder / "out"), bf16=device == "cuda", use_cpu=device == "cpu",
        optim="adamw_torch_fused", gradient_checkpointing=True, learning_rate=1e-6, max_grad_norm=1.0,
        num_train_epochs=2.0, per_device_train_batch_size=1, save_strategy="no", report_to="none",
        disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip


class Bench:
    """The two trainers over one model, and what they are handed."""

    def __init__(self, folder: Path, config: PreTrainedConfig, *, device: str, lora: bool) -> None:
        self.ours = build_ours(folder, config, device=device, lora=lora)
        self.config: Any = config
        self.device = torch.device(device)
        self.pad = PaddedCollator(self.ours.processor.tokenizer.pad_token_id)  # pyright: ignore[reportAttributeAccessIssue]
        arguments = PlainArguments(remove_unused_columns=False, **shared_arguments(folder, device))
        self.plain = Trainer(model=self.ours.model, args=arguments)

    def collate_plain(self, rows: list[list[Item]]) -> dict[str, Any]:
        batch = self.pad(rows[0])
        del batch["position_ids"]  # The model library computes its own, from the kinds of tokens.
        ids = batch["input_ids"]
        kinds = (ids == self.config.image_token_id).long() + 2 * (ids == self.config.video_token_id).long()
        return batch | {"mm_token_type_ids": kinds}

    def collate_ours(self, rows: list[list[Item]]) -> dict[str, Any]:
        return FlattenedCollator()(rows[0])

    @contextmanager
    def set_up(self, way: Way, batches: list[list[Item]]) -> Iterator[Any]:
        """The trainer of a way over batches, the way's levers off."""
        trainer: Any = self.plain if way.plain else self.ours
        trainer.train_dataset, trainer.data_collator = batches, self.collate_ours
        if way.plain:
            scaled = [[scale_pixels(item, self.ours.processor) for item in batch] for batch in batches]
            trainer.train_dataset, trainer.data_collator = scaled, self.collate_plain
        with ExitStack() as stack:
            for lever in way.off:
                stack.enter_context(LEVERS[lever](trainer))
            yield trainer

    @contextmanager
    def untrained(self, way: Way, batches: list[list[Item]]) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """The trainer of a way that computes as in a step, without gradients, and its model's inputs."""
        with self.set_up(way, batches) as trainer, torch.no_grad(), trainer.accelerator.autocast():
            trainer.model.train()
            collated = (trainer.data_collator([batch]) for batch in trainer.train_dataset)
            yield trainer, [trainer._prepare_inputs(batch) for batch in collated]

    def loss(self, way: Way, batches: list[list[Item]]) -> float:
        """The mean loss a token by the trainer's own `compute_loss`."""
        with self.untrained(way, batches) as (trainer, inputs):
            counts = [int(count_loss_tokens(each)) for each in inputs]
            means = [float(trainer.compute_loss(trainer.model, each)) for each in inputs]
        return sum(map(math.prod, zip(means, counts, strict=True))) / sum(counts)

    def token_losses(self, way: Way, batches: list[list[Item]]) -> torch.Tensor:
        """Of the tokens that carry loss, of a way that has QwenVLTrainer."""
        losses = []
        with self.untrained(way, batches) as (trainer, inputs):
            for each in inputs:
                found = trainer.trained_losses(trainer.model, each)
                losses.append(found.losses[each["labels"][:, found.columns + 1] != -100])
        return torch.cat(losses).double()

    def check(self, batches: list[list[Item]], tolerance: tuple[float, float]) -> dict[str, Any]:
        """What the sides' first losses are; ends the program where they are too far apart."""
        means = {way: self.loss(WAYS[way], batches) for way in SIDES}
        flat, ours = (self.token_losses(WAYS[way], batches) for way in ("flat", "ours"))
        apart = float((flat - ours).square().mean().sqrt() / ours.std())
        # Written so that a loss that is no number fails.
        if not (max(means.values()) - min(means.values()) <= tolerance[0] * means["plain"]):
            sys.exit(f"the mean losses differ, {means}: nothing is timed")
        if not apart <= tolerance[1]:
            sys.exit(
                f"the token losses of flat and ours differ by {apart:.2g} of their spread: nothing is timed"
            )
        return {"mean_loss_a_token": means, "token_losses_apart": apart}

    def work(self, batches: list[list[Item]]) -> Work:
        """The operations that one pass over the batches needs."""
        each = [self.ours.meter.work(self.collate_ours([batch])) for batch in batches]
        return Work(*torch.stack(each).sum(0).tolist())

    def time(self, way: Way, batches: list[list[Item]], profiler: Any = None) -> "Timer":
        """An epoch to warm up and a timed one; the timer is empty where memory ran out."""
        timer = Timer(self.device, len(batches), profiler)
        with self.set_up(way, batches) as trainer:
            trainer.add_callback(timer)
            try:
                with redirect_stdout(io.StringIO()):
                    trainer.train()
            except torch.OutOfMemoryError:
                timer.seconds.clear()
            trainer.remove_callback(timer)
            self._release(trainer)
        return timer

    @staticmethod
    def _release(trainer: Any) -> None:
        """Nothing of a run stays on the device but the model, as it was."""
        handler = trainer.callback_handler
        trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
        trainer.model.zero_grad(set_to_none=True)
        # Accelerate's own unwrapping takes the model library's decorators off too.
        for name in ("forward", "_original_forward"):
            vars(trainer.model).pop(name, None)
        trainer.accelerator.free_memory()


@dataclass(eq=False)
class Timer(TrainerCallback):
    """Seconds of each step behind the first `skip`; a profiler watches the first of those."""

    device: torch.device
    skip: int
    profiler: Any = None
    seconds: list[float] = field(default_factory=list)
    done: int = 0
    began: float = 0.0
    peak: int = 0

    def _wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.done == self.skip:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if self.profiler:
                self.profiler.start()
        self.began = self._wait()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        taken = self._wait() - self.began
        if self.done == self.skip and self.profiler:
            self.profiler.stop()
        if self.done >= self.skip:
            self.seconds.append(taken)
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        self.done += 1


def profiled(bench: Bench, batches: list[list[Item]]) -> dict[str, Any]:
    """One step of ours by kind of kernel, and the kernels that take the longest.

    kernel_seconds against step_seconds: how busy the device was. The profiler makes the step itself longer.
    """
    cuda = bench.device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    timer = bench.time(WAYS["ours"], batches[:1], profiler)
    if not timer.seconds:
        return {"out_of_memory": True}
    taken: dict[str, float] = {}
    for event in profiler.key_averages():
        # Operators carry the time of the kernels that they start: those count by themselves.
        if cuda and (event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False)):
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        taken[event.key] = taken.get(event.key, 0.0) + spent / 1e6
    total = sum(taken.values())
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, spent in taken.items():
        shares[kind_of(name)] += spent / total
    longest = sorted(taken, key=lambda name: -taken[name])[:25]
    return {
        "step_seconds": timer.seconds[0], "kernel_seconds": total, "shares": shares,
        "longest": [
            {"name": name[:160], "kind": kind_of(name), "share": taken[name] / total} for name in longest
        ],
    }  # fmt: skip


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel.lower())), "other")


def spread(slow: list[float], fast: list[float]) -> dict[str, float] | None:
    """By how much `fast` is faster, round by round; None where one of them ran out of memory."""
    if not slow or not fast:
        return None
    each = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}


def rounds_of(bench: Bench, batches: list[list[Item]], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each way the seconds of each round's steps and the most memory; no seconds where it ran out."""
    found: dict[str, dict[str, Any]] = {way: {"seconds": [], "peak": 0} for way in WAYS}
    lacking = set()
    for number in range(rounds):
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            if name in lacking:
                continue
            timer = bench.time(WAYS[name], batches)
            if not timer.seconds:
                lacking.add(name)
                found[name]["seconds"].clear()
                continue
            found[name]["seconds"].append(sum(timer.seconds))
            found[name]["peak"] = max(found[name]["peak"], timer.peak)
    return found


def side_report(found: dict[str, Any], work: Work, peak: float | None) -> dict[str, Any]:
    memory = found["peak"] / GIB if found["peak"] else None
    if not found["seconds"]:
        return {"out_of_memory": True}
    seconds = statistics.median(found["seconds"])
    share = None
    if peak:
        room = seconds * peak * 1e12
        share = {"language": work.language / room, "vision": work.vision / room}
        share["whole"] = share["language"] + share["vision"]
    return {
        "seconds": found["seconds"], "tokens_per_second": work.tokens / seconds,
        "samples_per_second": work.samples / seconds, "mfu": share, "peak_memory_gib": memory,
    }  # fmt: skip


def workload_report(
    bench: Bench, batches: list[list[Item]], checked: dict[str, Any], rounds: int, peak: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one workload shows, and of each lever what ours takes without it."""
    work = bench.work(batches)
    found = rounds_of(bench, batches, rounds)
    ours = found["ours"]["seconds"]
    report = {
        "steps": len(batches), "samples": work.samples, "tokens": work.tokens, "patches": work.patches,
        "padded_tokens": sum(map(padded_tokens, batches)), "loss_tokens": work.loss_tokens,
        "operations": {"language": work.language, "vision": work.vision}, **checked,
        "sides": {way: side_report(found[way], work, peak) for way in SIDES},
        "ratios": {f"ours / {way}": spread(found[way]["seconds"], ours) for way in ("plain", "flat")},
    }  # fmt: skip
    levers = {}
    for lever in LEVERS:
        without = found[lever]["seconds"]
        levers[lever] = {
            "step_seconds_without": statistics.median(without) / len(batches) if without else None,
            "ours / without": spread(without, ours),
            "peak_memory_gib_without": found[lever]["peak"] / GIB or None,
        }
    return report, levers


def say(name: str, report: dict[str, Any]) -> None:
    print(f"{name}: {report['samples']:.0f} samples, {report['tokens']:.0f} tokens, {report['steps']} steps")
    for way, side in report["sides"].items():
        if "out_of_memory" in side:
            print(f"  {way:6} out of memory")
            continue
        mfu = f", MFU {side['mfu']['whole']:.1%}" if side["mfu"] else ""
        memory = f", {side['peak_memory_gib']:.1f} GiB" if side["peak_memory_gib"] else ""
        print(f"  {way:6} {side['tokens_per_second']:9.0f} tokens/s{mfu}{memory}")
    for pair, ratio in report["ratios"].items():
        if ratio:
            print(f"  {pair:13} {ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")


def device_and_peak(smoke: bool, given: float | None) -> tuple[str, float | None]:
    """The device's name and its peak; ends the program where they do not fit what is asked."""
    if smoke:
        return "CPU", None
    if not torch.cuda.is_available():
        sys.exit("bench_gpu: --size needs a CUDA device; --smoke runs everything at nano size on the CPU")
    if torch.cuda.device_count() > 1:
        sys.exit("bench_gpu: the Trainer would split batches over all GPUs; set CUDA_VISIBLE_DEVICES to one")
    name = torch.cuda.get_device_name()
    if (peak := given or PEAKS.get(name)) is None:
        sys.exit(f"bench_gpu: no peak is known of {name}; give its dense bf16 --peak_tflops")
    return name, peak


def geometry(size: str | None) -> PreTrainedConfig:
    if size is None:
        return nano_config("qwen3_vl", nano_tokenizer("qwen3_vl"))
    family, layers = SIZES[size]
    config: Any = published_config(family, size, nano_tokenizer(family))
    if layers:
        config.text_config.num_hidden_layers = layers
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--size", choices=SIZES)
    what.add_argument("--smoke", action="store_true", help="one round at nano size on the CPU: does it run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak_tflops", type=float, help="of a device that PEAKS does not know")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-SIZE.json")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: give 1 or more")
    device_name, peak = device_and_peak(options.smoke, options.peak_tflops)
    device, dtype = ("cpu", "fp32") if options.smoke else ("cuda", "bf16")
    rounds, budget, steps = (1, 256, 1) if options.smoke else (options.rounds, 4096, 4)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config: Any = geometry(options.size)
    if options.smoke:
        linear_cross_entropy.PIECE_BYTES = 4 * 8 * config.text_config.vocab_size
    workloads = {kind: steps_of(kind, config, budget, steps) for kind in ("pictures", "text", "video")}
    meta = random_model(config, device="meta", dtype=torch.float32, seed=0)
    parameters = sum(parameter.numel() for parameter in meta.parameters())
    lora, why = False, "full tuning: nano size"
    if not options.smoke:
        widest = max(padded_tokens(batch) for batches in workloads.values() for batch in batches)
        vocabulary = config.text_config.vocab_size
        lora, why = choose_tuning(parameters, vocabulary, widest, torch.cuda.mem_get_info()[0])
    print(f"{device_name}, {parameters / 1e9:.2f} billion parameters, {why}")
    packages = ("torch", "transformers", "accelerate", "peft")
    result = provenance(*packages, cuda=torch.version.cuda or "none") | {
        "device": device_name, "size": options.size or "nano", "family": config.model_type,
        "language_layers": config.text_config.num_hidden_layers, "parameters": parameters, "tuning": why,
        "dtype": dtype, "rounds": rounds, "tokens_a_step": budget, "tolerance": TOLERANCE[dtype],
        "peak_tflops": peak, "mfu_left_out": None if peak else "no peak is known of a CPU",
        "workloads": {}, "levers": {}, "profile": {},
    }  # fmt: skip
    output = options.output
    if not output and options.size:
        output = ROOT / f"benchmarks/results/gpu-{options.size}.json"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), config, device=device, lora=lora)
        # All of them before a step changes the weights.
        checks = {kind: bench.check(batches, TOLERANCE[dtype]) for kind, batches in workloads.items()}
        for kind, batches in workloads.items():
            report, levers = workload_report(bench, batches, checks[kind], rounds, peak)
            result["workloads"][kind], result["levers"][kind] = report, levers
            result["profile"][kind] = profiled(bench, batches)
            say(kind, report)
            if output:  # Now, since time on a GPU may end before the last workload does.
                output.write_text(json.dumps(result, indent=2) + "\n")
    if output:
        print(f"written: {output}")


if __name__ == "__main__":
    main()
