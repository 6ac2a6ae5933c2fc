"""A training step on samples of unlike lengths: flattened and packed against padded batches.

    .venv/bin/python benchmarks/bench_train.py [--rounds 5] [--quick] [--output FILE]

    train_mix.json -> 256 conversations, encoded once, kept in memory
      plain      transformers' Trainer and collator, padded, random order     its own loss, sdpa
      grouped    the same, batches of similar length
      padded     QwenVLTrainer, padded, the batches of `plain`
      flattened  QwenVLTrainer, the same batches without padding
      packed     QwenVLTrainer, packs of the same mean number of samples
      --mean loss a token of the first weights equal in all?--> rounds, one epoch each --> ratios

Every side trains all weights of the small model from the same start with the same optimiser; what is timed
is `Trainer.train()`. train_mix.json holds the words of each answer and the pictures of each question: most
samples short, a tail of long ones. Goal: packed at 1.8 times the samples a second of padded. Results go to
benchmarks/results/train.json; with --quick only where --output says.
"""

import argparse
import io
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from provenance import provenance
from transformers import AutoModelForImageTextToText, HfArgumentParser, Trainer
from transformers import TrainingArguments as PlainArguments

from qwen_vl_utils import scale_pixels
from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.packing import join, plan_packs
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.train_qwen import build_trainer
from qwenvl.train.trainer import count_loss_tokens, token_losses

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/qwen3-vl-nano"
MIX = Path(__file__).with_name("train_mix.json")
GOAL = 1.8
BATCH = 8
Item = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Side:
    """One way to train: `make` builds its trainer, `steps` are in an epoch, `loss` the mean loss a token."""

    make: Callable[[], Trainer]
    steps: int
    loss: float


def write_rows(folder: Path, count: int) -> Path:
    """The conversations that the mix describes, with noise as pictures; returns the TOML file."""
    words, rows = "red green blue gray pink circle box left right up down".split(), []
    random = np.random.default_rng(0)
    for number, entry in enumerate(json.loads(MIX.read_text())[:count]):
        names = []
        for width, height in entry["pictures"]:
            names.append(f"{number}-{len(names)}.png")
            noise = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((width, height)).save(folder / names[-1])
        answer = " ".join(random.choice(words, entry["words"]))
        turns = [
            {"from": "human", "value": "<image>" * len(names) + "What?"},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"image": names, "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(rows))
    (folder / "data.toml").write_text('[mix]\nannotation_path = "mix.json"\n')
    return folder / "data.toml"


def parse(folder: Path, data: Path, *more: str) -> tuple[Any, Any, Any]:
    kinds: Any = (ModelArguments, DataArguments, TrainingArguments)
    flags = ["--model_name_or_path", str(MODEL), "--dataset_config", str(data), "--dataset_use", "mix"]
    flags += ["--output_dir", str(folder / "out"), "--model_max_length", "8192", "--disable_tqdm", "True"]
    flags += ["--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--tune_mm_vision", "True"]
    flags += ["--max_pixels", "50176", "--save_strategy", "no", "--report_to", "none"]
    flags += ["--learning_rate", "1e-5", "--max_grad_norm", "1", "--num_train_epochs", "1"]
    flags += ["--per_device_train_batch_size", str(BATCH), *more]
    return HfArgumentParser(kinds).parse_args_into_dataclasses(flags)


def ours(folder: Path, data: Path, items: list[Item], collator: Any, *flags: str) -> Side:
    """A QwenVLTrainer over items that are encoded already."""

    def make() -> Trainer:
        trainer = build_trainer(*parse(folder, data, *flags))
        trainer.train_dataset, trainer.data_collator = items, collator  # pyright: ignore[reportAttributeAccessIssue]
        return trainer

    size = 1 if flags and flags[-1] == "1" else BATCH
    trainer = make()
    batches = [collator(items[at : at + size]) for at in range(0, len(items), size)]
    with torch.no_grad():
        found = (token_losses(trainer.model, trainer._prepare_inputs(batch)).losses for batch in batches)
        total = sum(float(losses.double().sum()) for losses in found)
    return Side(make, len(batches), total / sum(int(count_loss_tokens(batch)) for batch in batches))


def plain(folder: Path, items: list[Item], collator: PaddedCollator, strategy: str) -> Side:
    """The base class alone, which computes the loss and the positions as the model library does."""

    def collate(rows: list[Any]) -> dict[str, Any]:
        batch = collator(rows)
        del batch["position_ids"]
        ids = batch["input_ids"]
        kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        return batch | {"mm_token_type_ids": kinds}

    def load() -> Any:
        return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)

    def make() -> Trainer:
        arguments = PlainArguments(
            output_dir=str(folder / "plain"), per_device_train_batch_size=BATCH, num_train_epochs=1,
            learning_rate=1e-5, max_grad_norm=1, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, train_sampling_strategy=strategy, use_cpu=True, optim="adamw_torch",
            length_column_name="length", logging_steps=1000,
        )  # fmt: skip
        rows: Any = Rows(items)
        return Trainer(model=load(), args=arguments, train_dataset=rows, data_collator=collate)

    model = load()
    config = model.config
    total = tokens = 0.0
    with torch.no_grad():
        for at in range(0, len(items), BATCH):
            batch = collate(items[at : at + BATCH])
            count = int(count_loss_tokens(batch))
            total, tokens = total + float(model(**batch).loss) * count, tokens + count
    return Side(make, -(-len(items) // BATCH), total / tokens)


class Rows(torch.utils.data.Dataset):
    """Encoded items, with their lengths where the base class looks for them."""

    def __init__(self, items: list[Item]):
        self.items = items
        self.column_names = ["length"]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | str) -> Any:
        return [len(item["input_ids"]) for item in self.items] if index == "length" else self.items[index]  # pyright: ignore[reportCallIssue, reportArgumentType]


def sides(folder: Path, count: int) -> dict[str, Side]:
    data = write_rows(folder, count)
    trainer = build_trainer(*parse(folder, data))
    dataset: Any = trainer.train_dataset
    items = [dataset[index] for index in range(len(dataset))]
    pad = PaddedCollator(trainer.processor.tokenizer.pad_token_id)
    scaled = [scale_pixels(item, trainer.processor) for item in items]
    tokens = np.array([len(item["input_ids"]) for item in items])
    patches = np.array([len(item.get("pixel_values", ())) for item in items])
    budget = max(int(tokens.mean() * BATCH), int(tokens.max()))
    packs = [
        join([items[index] for index in pack]) for pack in plan_packs(tokens, patches, budget, None, seed=0)
    ]
    return {
        "plain": plain(folder, scaled, pad, "random"),
        "grouped": plain(folder, scaled, pad, "group_by_length"),
        "padded": ours(folder, data, items, pad, "--data_flatten", "False"),
        "flattened": ours(folder, data, items, FlattenedCollator()),
        "packed": ours(
            folder, data, packs, FlattenedCollator(), "--per_device_train_batch_size", "1",
        ),
    }  # fmt: skip


def seconds(side: Side) -> float:
    trainer = side.make()
    with redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 32 samples: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train.json")
    options = parser.parse_args()
    rounds, count = (2, 32) if options.quick else (options.rounds, 256)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = provenance("torch", "transformers", "accelerate")
    with tempfile.TemporaryDirectory() as name:
        ways = sides(Path(name), count)
        losses = {way: side.loss for way, side in ways.items()}
        if max(losses.values()) - min(losses.values()) > 1e-5 * losses["plain"]:
            sys.exit(f"the mean losses differ, {losses}: nothing is timed")
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in list(ways)[:: 1 if number % 2 else -1]:
                taken[way].append(seconds(ways[way]))
    speed = {way: count / statistics.median(times) for way, times in taken.items()}
    ratios = {}
    for way, base in (
        ("packed", "padded"),
        ("flattened", "padded"),
        ("packed", "plain"),
        ("packed", "grouped"),
    ):
        each = sorted(slow / fast for slow, fast in zip(taken[base], taken[way], strict=True))
        ratios[f"{way} / {base}"] = {
            "median": statistics.median(each),
            "lowest": each[0],
            "highest": each[-1],
        }
    result |= {
        "rounds": rounds, "samples": count, "goal": GOAL, "mean_loss_a_token": losses,
        "steps": {way: side.steps for way, side in ways.items()},
        "samples_per_second": speed, "ratios": ratios,
    }  # fmt: skip
    print(f"{count} samples, mean loss a token {losses['plain']:.6f} in all")
    for way, value in speed.items():
        print(f"  {way:9} {value:7.1f} samples/s, {ways[way].steps} steps an epoch")
    for pair, ratio in ratios.items():
        print(f"  {pair:18} {ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/train.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
