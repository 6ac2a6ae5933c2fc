"""Pack data sets under a budget of tokens and one of vision patches, into one annotation file.

    python qwen-vl-finetune/tools/pack_data.py --dataset_config data.toml --dataset_use receipts,charts%50 \\
        --model_name_or_path CHECKPOINT --model_max_length 16384 --pack_max_patches 49152 --output packed.json

    data sets -> checked and measured as training does -> packs, those of --data_packing True on the fly
      -> packed.json: a list, one pack a line, each a list of samples as they were, media paths absolute

Lengths are read from headers and depend on the checkpoint's processor and the limits of pixels and frames:
give the flags that training will get.  Train on the output with --data_packing True, which then measures
nothing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import transformers

from qwenvl.data import data_list
from qwenvl.data.budget import DROPPING
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.messages import is_url
from qwenvl.data.packed import PackedDataset
from qwenvl.data.sources import samples_of
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor

MEDIA_KEYS = frozenset({"image", "images", "image_url", "video", "videos", "video_url"})


@dataclass
class OutputArguments:
    """Where the packs go."""

    output: str = field(default="", metadata={"help": "File to write: .json or .jsonl."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the file if it is there."})


def absolute(fields: dict, data_path: str) -> dict:
    """A sample with its media paths made absolute, else unchanged."""
    placed = {key: _place(value, data_path) if key in MEDIA_KEYS else value for key, value in fields.items()}
    for turns in ("conversations", "messages"):
        if placed.get(turns) is not None:
            placed[turns] = [_turn(turn, data_path) for turn in placed[turns]]
    return placed


def _turn(turn: dict, data_path: str) -> dict:
    return {
        key: [absolute(item, data_path) for item in value] if isinstance(value, list) and key == "content"
        else value
        for key, value in turn.items()
    }  # fmt: skip


def _place(value: Any, data_path: str) -> Any:
    """A media entry: a path, a list of them, or an object that holds one."""
    if isinstance(value, list):
        return [_place(each, data_path) for each in value]
    if isinstance(value, dict):
        keys = MEDIA_KEYS | {"path", "url"}
        return {key: _place(each, data_path) if key in keys else each for key, each in value.items()}
    if isinstance(value, str) and not is_url(value):
        return os.path.abspath(os.path.join(data_path, value))
    return value


def write_packs(dataset: PackedDataset, path: Path) -> None:
    """Write a row for each pack. The file appears when it is complete."""
    lines = path.suffix == ".jsonl"
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write("" if lines else "[\n")
        for number, pack in enumerate(dataset.packs):
            samples = []
            for index in pack.tolist():
                source, row = dataset.rows.row(index)
                for fields in samples_of(source.annotations.row(row)):
                    samples.append(absolute(fields, source.data_path))
            text = json.dumps(samples, ensure_ascii=False, default=_refuse)
            file.write(("" if lines or not number else ",\n") + text + ("\n" if lines else ""))
        file.write("" if lines else "\n]\n")
    os.replace(part, path)


def _refuse(value: object) -> None:
    raise ValueError(f"a row holds {type(value).__name__}, which JSON cannot; write media to files first")


def check_output(output: OutputArguments, data_args: DataArguments) -> Path:
    """The file to write. Raises ValueError where that would lose something."""
    path = Path(output.output)
    if data_args.too_long in DROPPING:
        raise ValueError(
            f"--too_long {data_args.too_long}: packs hold rows as they are; shorten while training, with "
            "--data_packing True on these data sets"
        )
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--output {output.output!r}: name a file that ends in .json or .jsonl")
    for entry in data_list(data_args.dataset_use.split(","), data_args.dataset_config):
        if Path(entry["annotation_path"]).resolve() == path.resolve():
            raise ValueError(
                f"--output {path} is the annotation file of {entry['dataset_name']}; name another"
            )
    if path.exists() and not output.overwrite:
        raise ValueError(f"--output {path} exists; name another file or pass --overwrite True")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--output {path}: its folder does not exist; make it first")
    return path


def main() -> None:
    """The command line."""
    kinds = (OutputArguments, ModelArguments, DataArguments, TrainingArguments)
    parser = transformers.HfArgumentParser(cast(Any, kinds))
    output, model_args, data_args, training_args = parser.parse_args_into_dataclasses(
        [*sys.argv[1:], "--data_packing", "True"]
    )
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("qwenvl").setLevel(logging.INFO)
    try:
        path = check_output(output, data_args)
        dataset = make_supervised_data_module(
            load_processor(model_args, data_args, training_args),
            data_args,
            model_config=load_config(model_args, training_args),
            model_max_length=training_args.model_max_length,
            seed=training_args.seed,
        )["train_dataset"]
        if not isinstance(dataset, PackedDataset):
            raise ValueError(f"--dataset_use {data_args.dataset_use}: every row is a pack already")
        write_packs(dataset, path)
    except ValueError as error:
        sys.exit(f"pack_data: {error}")
    print(f'{path}: written; for --dataset_config:\n[{path.stem}]\nannotation_path = "{path.resolve()}"')


if __name__ == "__main__":
    main()
