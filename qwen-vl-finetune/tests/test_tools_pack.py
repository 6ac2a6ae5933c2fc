"""Packing on the fly by train_qwen.py, and beforehand by tools/pack_data.py: the same packs."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, HfArgumentParser

from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.flops import MultiplyAdds
from qwenvl.data.packed import PackedDataset, measure_rows
from qwenvl.data.sources import open_annotations
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_model, load_processor
from qwenvl.train.train_qwen import train as train_here
from qwenvl.train.trainer import count_loss_tokens, token_losses

FOLDER = Path(__file__).resolve().parents[1]
DEMO = FOLDER / "demo"
NANO = FOLDER.parent / "models/qwen3-vl-nano"
DATA = ["--dataset_config", DEMO / "datasets.toml", "--dataset_use", "single_images,videos"]
BUDGETS = ["--model_max_length", "256", "--pack_max_patches", "600"]
COMMON = ["--model_name_or_path", NANO, "--report_to", "none", *BUDGETS]
KINDS = (ModelArguments, DataArguments, TrainingArguments)


def data_module(*flags) -> tuple[dict, tuple]:
    parsed = HfArgumentParser(KINDS).parse_args_into_dataclasses([*map(str, [*COMMON, *flags])])
    model_args, data_args, training_args = parsed
    config = load_config(model_args, training_args)
    processor = load_processor(model_args, data_args, training_args)
    length, seed = training_args.model_max_length, training_args.seed
    module = make_supervised_data_module(
        processor, data_args, model_config=config, model_max_length=length, seed=seed
    )
    return module, (config, processor, parsed)


@pytest.fixture(scope="module")
def packed() -> PackedDataset:
    return data_module(*DATA, "--data_packing", "True")[0]["train_dataset"]


def run(*command) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def pack_here(monkeypatch, *flags) -> str:
    """The tool's command line in this process; returns why it stopped."""
    spec = importlib.util.spec_from_file_location("pack_data", FOLDER / "tools/pack_data.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pack_data", tool)  # Its dataclasses ask for it.
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["pack_data.py", *map(str, flags)])
    try:
        tool.main()
    except SystemExit as stopped:
        return str(stopped)
    return ""


TRAINING = [
    *COMMON, *DATA, "--tune_mm_llm", "True", "--tune_mm_vision", "True", "--data_packing", "True",
    "--logging_steps", "1", "--disable_tqdm", "True", "--learning_rate", "1e-4", "--max_steps", "6",
    "--dataloader_drop_last", "True",
]  # fmt: skip


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train_two(output: Path, *flags) -> list[float]:
    """Train as users do, in two processes, a pack each a step."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    one_each = ["--per_device_train_batch_size", "1", "--output_dir", output]
    done = run(*launch, FOLDER / "qwenvl/train/train_qwen.py", *TRAINING, *one_each, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(output)


def test_sizes_from_headers_are_those_of_the_items(packed):
    sizes = measure_rows(packed.rows, None)
    for index, item in enumerate(packed.rows[row] for row in range(len(packed.rows))):
        pixels = [len(item[key]) for key in ("pixel_values", "pixel_values_videos") if key in item]
        assert (sizes.tokens[index], sizes.patches[index]) == (len(item["input_ids"]), sum(pixels))
        assert sizes.squares[index] == len(item["input_ids"]) ** 2


def test_a_pack_is_the_join_of_its_rows_under_both_budgets(packed):
    assert sorted(np.concatenate(packed.packs).tolist()) == list(range(len(packed.rows)))
    for number, pack in enumerate(packed.packs):
        item = packed[number]
        rows = [packed.rows[int(row)] for row in pack]
        assert torch.equal(item["input_ids"], torch.cat([row["input_ids"] for row in rows]))
        assert item["segment_lengths"].tolist() == [len(row["input_ids"]) for row in rows]
        pixels = [len(item[key]) for key in ("pixel_values", "pixel_values_videos") if key in item]
        assert len(item["input_ids"]) <= 256
        assert sum(pixels) <= 600
    assert len(packed.packs) < len(packed.rows) / 2


def test_the_loss_of_packs_is_that_of_their_samples_one_by_one(packed):
    _, (_, processor, arguments) = data_module(*DATA, "--data_packing", "True")
    model_args, data_args, training_args = arguments
    config = load_config(model_args, training_args)
    model = load_model(config, *arguments)
    plain = AutoModelForImageTextToText.from_pretrained(NANO)
    pad = PaddedCollator(processor.tokenizer.pad_token_id)
    assert data_args.data_packing
    for number in (0, len(packed) - 1):
        batch = FlattenedCollator()([packed[number]])
        alone = [pad([packed.rows[int(row)]]) for row in packed.packs[number]]
        with torch.no_grad():
            total = token_losses(model, batch)[0].sum()
            expected = sum(token_losses(plain, one)[0].sum() for one in alone)
        assert torch.allclose(total, expected, rtol=1e-5)
        assert count_loss_tokens(batch) == sum(count_loss_tokens(one) for one in alone)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Six steps, the last three in the second epoch, with a checkpoint after the fifth."""
    output = tmp_path_factory.mktemp("two")
    assert len(train_two(output, "--save_steps", "5")) == 6
    return output


def test_two_processes_take_the_steps_of_one(two_processes, packed, tmp_path):
    flags = ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--output_dir", tmp_path]
    train_here(*HfArgumentParser(KINDS).parse_args_into_dataclasses([*map(str, [*TRAINING, *flags])]))
    assert len(packed) // 2 == 3
    assert np.allclose(losses(two_processes), losses(tmp_path), rtol=2e-5, atol=0)


def test_a_resumed_run_goes_on_within_its_epoch(two_processes, tmp_path):
    shutil.copytree(two_processes / "checkpoint-5", tmp_path / "checkpoint-5")
    assert train_two(tmp_path, "--save_strategy", "no") == losses(two_processes)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, two_processes))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str, str]:
    path = tmp_path_factory.mktemp("written") / "demo-packs.json"
    done = run(FOLDER / "tools/pack_data.py", *COMMON, *DATA, "--output", path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout, done.stderr


def test_the_tool_writes_the_packs_that_training_would_make(written, packed):
    path, _, said = written
    rows = json.loads(path.read_text())
    expected = []
    for pack in packed.packs:
        found = [packed.rows.row(int(index)) for index in pack]
        expected.append([source.annotations.row(row) for source, row in found])
    assert [[fields["conversations"] for fields in row] for row in rows] == [
        [fields["conversations"] for fields in row] for row in expected
    ]
    media = [fields[kind] for row in rows for fields in row for kind in ("image", "video") if kind in fields]
    paths = [path for each in media for path in (each if isinstance(each, list) else [each])]
    assert paths
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in paths)
    assert f"packing: {len(packed.rows)} rows in {len(packed)} packs" in said
    assert "of 256 a pack" in said
    assert "of 600 a pack" in said
    assert len(open_annotations(path)) == len(packed)


def test_written_packs_are_read_by_the_entry_that_the_tool_prints(written, packed, tmp_path):
    toml = tmp_path / "data.toml"
    toml.write_text(written[1][written[1].index("[demo-packs]") :])
    flags = ["--dataset_config", toml, "--dataset_use", "demo-packs", "--data_packing", "True"]
    dataset = data_module(*flags)[0]["train_dataset"]
    assert len(dataset) == len(packed)
    for number in range(len(packed)):
        item, expected = dataset[number], packed[number]
        assert item.keys() == expected.keys()
        # Of another data set: the packs here, there the sets that they were made of.
        assert all(torch.equal(item[name], expected[name]) for name in expected if name != "dataset")


def test_the_tool_takes_both_formats_and_packed_rows(tmp_path, pictures, clip, monkeypatch):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cat."}]
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "video", "video": str(clip), "fps": 2.0},
        {"type": "text", "text": "?"},
    ]
    reply = {"role": "assistant", "content": "B.", "weight": 0.5}
    messages = {"messages": [{"role": "user", "content": content}, reply], "images": None}
    old = {"image": "b.png", "conversations": turns}
    listed = {"images": [{"image": "c.png", "max_pixels": 50176}], "conversations": turns}
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, [messages, [old, listed], old])))
    toml = tmp_path / "data.toml"
    toml.write_text(f'[mine]\nannotation_path = "in.jsonl"\ndata_path = "{pictures}"\n')
    given = ["--dataset_config", toml, "--dataset_use", "mine", "--model_max_length", "2048"]
    output = tmp_path / "out.jsonl"
    assert pack_here(monkeypatch, *COMMON[:4], *given, "--output", output) == ""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(map(len, rows)) == [2, 2]
    new = next(fields for row in rows for fields in row if "messages" in fields)
    items = new["messages"][0]["content"]
    assert items[0]["image_url"]["url"] == str(pictures / "a.png")
    assert items[1:] == content[1:]
    assert new["messages"][1] == reply
    whole = next(row for row in rows if not any("messages" in fields for fields in row))
    assert whole == [
        old | {"image": str(pictures / "b.png")},
        listed | {"images": [{"image": str(pictures / "c.png"), "max_pixels": 50176}]},
    ]


def test_the_tool_never_writes_over_a_file_unasked(written, tmp_path, monkeypatch):
    path, _, _ = written
    before = path.read_bytes()
    toml = tmp_path / "data.toml"
    toml.write_text(f'[mine]\nannotation_path = "{path}"\n')
    mine = ["--dataset_config", toml, "--dataset_use", "mine"]
    for flags, reason in (
        ([*DATA, "--output", path], "exists; name another file or pass --overwrite True"),
        ([*mine, "--output", path, "--overwrite", "True"], "is the annotation file of mine; name another"),
        ([*mine, "--output", tmp_path / "new.json"], "every row is a pack already"),
        ([*DATA, "--output", tmp_path / "packs.txt"], "name a file that ends in .json or .jsonl"),
        ([*DATA, "--output", tmp_path / "no/packs.json"], "its folder does not exist; make it first"),
    ):
        stopped = pack_here(monkeypatch, *COMMON, *flags)
        assert stopped.startswith("pack_data: --")
        assert reason in stopped
    assert path.read_bytes() == before


def rows_file(folder: Path, pictures: Path) -> list:
    """Four rows: good, too long, not a picture, good."""
    (folder / "broken.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cat."}]
    long = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "word " * 400}]
    rows = [
        {"image": str(pictures / "a.png"), "conversations": turns},
        {"conversations": long},
        {"image": str(folder / "broken.png"), "conversations": turns},
        {"image": str(pictures / "b.png"), "conversations": turns},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "data.toml").write_text('[rows]\nannotation_path = "rows.jsonl"\n')
    return ["--dataset_config", folder / "data.toml", "--dataset_use", "rows", "--data_packing", "True"]


def test_a_row_that_cannot_be_packed_is_named_before_training(tmp_path, pictures):
    flags = rows_file(tmp_path, pictures)
    too_long = r"rows.jsonl: line 2 \(counted from 1\): \d+ tokens .* exceed --model_max_length 256"
    with pytest.raises(ValueError, match=too_long + r".*\(1 more of 4 rows are bad too\)"):
        data_module(*flags)
    with pytest.raises(ValueError, match=r"line 1 .*: \d+ patches exceed --pack_max_patches 8; raise it"):
        data_module(*flags, "--pack_max_patches", 8)
    with pytest.raises(ValueError, match="--pack_max_patches 8: give a number above 0, with --data_packing"):
        DataArguments(pack_max_patches=8)


def test_rows_that_cannot_be_packed_are_left_out_on_request(tmp_path, pictures, caplog):
    with caplog.at_level(logging.WARNING, logger="qwenvl.data"):
        module, _ = data_module(*rows_file(tmp_path, pictures), "--bad_samples", "skip")
    dataset = module["train_dataset"]
    assert sorted(np.concatenate(dataset.packs).tolist()) == [0, 3]
    assert "packing: skipped 2 of 4 rows" in caplog.text
    assert "line 2 (counted from 1): " in caplog.text
    # A picture that breaks after it was measured is left out of its pack.
    [pack] = dataset.packs
    (tmp_path / "gone.png").symlink_to(pictures / "b.png")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows[3]["image"] = str(tmp_path / "gone.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = data_module(
        "--dataset_config", tmp_path / "data.toml", "--dataset_use", "rows", "--data_packing", "True",
        "--bad_samples", "skip",
    )[0]["train_dataset"]  # fmt: skip
    assert len(pack) == 2
    (tmp_path / "gone.png").unlink()
    assert dataset[0]["segment_lengths"].tolist() == dataset.rows[0]["segment_lengths"].tolist()
    assert dataset.skipped == 1


def test_dear_packs_cost_more(packed):
    sizes = measure_rows(packed.rows, None)
    assert packed.costs.shape == (len(packed),)
    others = dict(logit=9.0, frame_square=9.0, window_square=0.0, window=0, merge=2)
    cost = MultiplyAdds(token=2.0, square=0.5, patch=1.0, merger=2.0, **others)
    weighted = [2.0 * sizes.tokens[pack].sum() + 3.0 * sizes.patches[pack].sum()
                + 0.5 * (sizes.tokens[pack] ** 2).sum() for pack in packed.packs]  # fmt: skip
    assert sizes.costs(packed.packs, cost).tolist() == weighted
