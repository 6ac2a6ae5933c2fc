"""Rows to batches on one core: dataset and collator against the model library's processor.

    .venv/bin/python benchmarks/bench_data.py [--rounds 7] [--quick] [--output FILE]

    rows --processor's chat template, get_rope_index, labels by search--> padded batch       plain
    rows --SupervisedDataset, PaddedCollator-----------------------------> padded batch       ours
                                            --pixels scaled, on this core--> padded batch       ours, scaled
    pictures --PIL, to RGB-----------------------------------------------> pixels             decode
                          --torch's bicubic kernel-----------------------> pixels resized     resize
      --input_ids, labels, positions, grids, scaled pixels equal?--> rounds, sides in turn --> ratios

All sides run in this process on one core and one thread and decode the same JPEG files. The trainer gets its
pixels as uint8 and scales them on its device; where that is this core, the third side is what it costs.
Goals: 1.5 times the rows a second, and at most 1.3 times the time of decoding alone; decoding and resizing to
the bit is the floor of what equal pixels cost. Results go to benchmarks/results/data.json; with --quick only
where --output says.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from preprocess_media import photo
from provenance import provenance
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize
from transformers import AutoModelForImageTextToText, HfArgumentParser

from qwen_vl_utils import scale_pixels
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/qwen3-vl-nano"
GOAL, GOAL_OVER_DECODE = 1.5, 1.3
BATCH = 4
LABELS = {
    "plain": "model library's processor",
    "ours": "dataset and collator",
    "scaled": "dataset, collator, pixels scaled",
    "decode": "decoding alone",
    "resize": "decoding and resizing alone",
}
Batch = dict[str, torch.Tensor]


def write_rows(folder: Path, count: int) -> Path:
    """The TOML file of `count` conversations about pictures of 0.2 to 1 megapixels, every fourth of text."""
    chance, rows = random.Random(0), []
    for index in range(count):
        row: dict[str, Any] = {"conversations": []}
        if index % 4:
            name = f"{index}.jpg"
            width, height = chance.randrange(500, 1200), chance.randrange(400, 900)
            photo(index, width, height).save(folder / name, quality=90)
            row["image"] = name
        for turn in range(1 + index % 3):
            words = " ".join(chance.choices("red green blue box circle left right".split(), k=20))
            tag = "<image>\n" if "image" in row and not turn else ""
            row["conversations"] += [
                {"from": "human", "value": f"{tag}What about {words}?"},
                {"from": "gpt", "value": words},
            ]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.toml").write_text('[rows]\nannotation_path = "rows.json"\n')
    return folder / "data.toml"


class Ours:
    """The way of `train_qwen.py`."""

    def __init__(self, module: dict[str, Any]):
        self.dataset, self.collate = module["train_dataset"], module["data_collator"]

    def batch(self, rows: range) -> Batch:
        return self.collate([self.dataset[index] for index in rows])


class Scaled(Ours):
    """The same, and what the trainer does with a batch on its device."""

    def __init__(self, module: dict[str, Any], processor: Any):
        super().__init__(module)
        self.processor = processor

    def batch(self, rows: range) -> Batch:
        return scale_pixels(super().batch(rows), self.processor)


class Decode:
    """What nobody can do without: the pictures of the same rows, decoded."""

    def __init__(self, folder: Path):
        self.files = [row.get("image") for row in json.loads((folder / "rows.json").read_text())]
        self.folder = folder

    def batch(self, rows: range) -> Batch:
        for index in rows:
            if name := self.files[index]:
                with Image.open(self.folder / name) as picture:
                    self.use(picture.convert("RGB"), index)
        return {}

    def use(self, picture: Image.Image, index: int) -> None:
        """Decoded is all it has to be."""


class Resize(Decode):
    """The same, and what equal pixels cost on top: the pictures at the sizes that the model sees."""

    def __init__(self, folder: Path, dataset: Any, patch: int):
        super().__init__(folder)
        grids = (dataset[index].get("image_grid_thw") for index in range(len(self.files)))
        self.sizes = [None if grid is None else (grid[0, 1:] * patch).tolist() for grid in grids]

    def use(self, picture: Image.Image, index: int) -> None:
        resize(pil_to_tensor(picture), self.sizes[index], InterpolationMode.BICUBIC, antialias=True)


class Plain:
    """What a training script does with the processor alone: template, processor, positions, labels."""

    def __init__(self, processor: Any, folder: Path):
        self.processor, self.folder = processor, folder
        self.rows = json.loads((folder / "rows.json").read_text())
        self.model = AutoModelForImageTextToText.from_pretrained(MODEL).model
        tokenizer = processor.tokenizer
        self.header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        for turn in row["conversations"]:
            text = turn["value"]
            content: list[dict[str, Any]] = []
            if text.startswith("<image>"):
                content.append({"type": "image", "path": str(self.folder / row["image"])})
                text = text.removeprefix("<image>")
            content.append({"type": "text", "text": text})
            role = "user" if turn["from"] == "human" else "assistant"
            found.append({"role": role, "content": content if role == "user" else text})
        return found

    def batch(self, rows: range) -> Batch:
        batch = self.processor.apply_chat_template(
            [self.messages(self.rows[index]) for index in rows],
            tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right", "return_mm_token_type_ids": True},
        )  # fmt: skip
        labels = torch.full_like(batch["input_ids"], -100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for start, end in self.answers(ids):
                labels[row, start:end] = batch["input_ids"][row, start:end]
        positions, _ = self.model.get_rope_index(
            batch["input_ids"],
            mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=batch.get("image_grid_thw"),
            attention_mask=batch["attention_mask"],
        )
        return {**batch, "labels": labels, "position_ids": positions}

    def answers(self, ids: list[int]) -> list[tuple[int, int]]:
        found, width = [], len(self.header)
        for at in range(len(ids) - width):
            if ids[at : at + width] == self.header:
                found.append((at + width, ids.index(self.end, at + width) + 1))
        return found


def check(ours: Batch, plain: Batch) -> None:
    """Stops where anything differs but the positions of padding."""
    real = ours["attention_mask"].bool()
    for name in ("input_ids", "labels", "attention_mask", "image_grid_thw", "pixel_values"):
        if (name in ours) != (name in plain) or (name in ours and not torch.equal(ours[name], plain[name])):
            sys.exit(f"{name} differs: nothing is timed")
    if not torch.equal(ours["position_ids"][:, real], plain["position_ids"][:, real]):
        sys.exit("position_ids differ: nothing is timed")


def spread(plain: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster, over the rounds."""
    ratios = sorted(a / b for a, b in zip(plain, ours, strict=True))
    return {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def seconds(side: Ours | Plain | Decode, batches: list[range]) -> float:
    began = time.perf_counter()
    for rows in batches:
        side.batch(rows)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 16 rows: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/data.json")
    options = parser.parse_args()
    rounds, count = (2, 16) if options.quick else (options.rounds, 96)
    result = provenance("torch", "torchvision", "transformers", "pillow")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ["--model_name_or_path", str(MODEL), "--dataset_config", str(write_rows(folder, count))]
        flags += ["--dataset_use", "rows", "--output_dir", name, "--model_max_length", "8192"]
        flags += ["--data_flatten", "False"]
        kinds = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))  # pyright: ignore[reportArgumentType]
        model_args, data_args, training_args = kinds.parse_args_into_dataclasses(flags)
        config = load_config(model_args, training_args)
        processor = load_processor(model_args, data_args, training_args)
        module = make_supervised_data_module(
            processor, data_args, model_config=config, model_max_length=8192, seed=0
        )
        sides = {
            "plain": Plain(processor, folder), "ours": Ours(module), "scaled": Scaled(module, processor),
            "decode": Decode(folder),
            "resize": Resize(folder, module["train_dataset"], processor.image_processor.patch_size),
        }  # fmt: skip
        batches = [range(at, at + BATCH) for at in range(0, count, BATCH)]
        for rows in batches:
            check(sides["scaled"].batch(rows), sides["plain"].batch(rows))
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sorted(sides, reverse=number % 2 == 1):
                taken[side].append(seconds(sides[side], batches))
    result |= {
        "rounds": rounds, "rows": count, "goal": GOAL, "goal_over_decode": GOAL_OVER_DECODE,
        "rows_per_second": {side: count / statistics.median(times) for side, times in taken.items()},
        "ratio": {side: spread(taken["plain"], taken[side]) for side in ("ours", "scaled")},
        "over_decode": spread(taken["ours"], taken["decode"]),
        "over_resize": spread(taken["ours"], taken["resize"]),
    }  # fmt: skip
    print(f"{count} rows; ids, labels, positions, grids and scaled pixels equal; rows/s on one core:")
    for side, label in LABELS.items():
        ratio = result["ratio"].get(side)
        times = f"  {ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})" if ratio else ""
        print(f"  {label:34} {result['rows_per_second'][side]:6.1f}{times}")
    print(f"  dataset and collator: goal {GOAL}x; times as long as")
    for side, goal in (("decode", f", goal at most {GOAL_OVER_DECODE}"), ("resize", "")):
        low, median, high = (result[f"over_{side}"][which] for which in ("lowest", "median", "highest"))
        print(f"    {LABELS[side]:32} {median:.2f} ({low:.2f} to {high:.2f}){goal}")
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/data.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
