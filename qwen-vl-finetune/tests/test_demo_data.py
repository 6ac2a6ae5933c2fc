"""The data sets of demo/ train as they are, each by train_qwen.py or, of pairs, train_dpo.py."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

FOLDER = Path(__file__).resolve().parents[1]
DEMO = FOLDER / "demo"
SETS = tomllib.loads((DEMO / "datasets.toml").read_text())
BATCHING = {"packed": ["--data_packing", "True"]}
SCRIPT = {"preferences": "train_dpo.py"}


def media(row: dict | list) -> set[str]:
    if isinstance(row, list):
        return set().union(*map(media, row))
    named = [row[kind] for kind in ("image", "video") if kind in row]
    return {name for names in named for name in (names if isinstance(names, list) else [names])}


def test_the_originals_three_kinds_are_there():
    assert SETS.keys() == {"single_images", "videos", "packed", "preferences"}
    used = set()
    for table in SETS.values():
        rows = json.loads((DEMO / table["annotation_path"]).read_text())
        used |= set().union(*map(media, rows))
    lying = {str(path.relative_to(DEMO)) for kind in ("images", "videos") for path in (DEMO / kind).iterdir()}
    assert used == lying


@pytest.mark.parametrize("name", SETS)
def test_it_trains_two_steps(name, tmp_path):
    flags = ["--model_name_or_path", FOLDER.parent / "models/qwen3-vl-nano", "--output_dir", tmp_path]
    flags += ["--dataset_config", DEMO / "datasets.toml", "--dataset_use", name, "--tune_mm_llm", "True"]
    flags += ["--per_device_train_batch_size", "2", "--max_steps", "2", "--logging_steps", "1"]
    flags += ["--report_to", "none", "--save_strategy", "no", *BATCHING.get(name, [])]
    command = [sys.executable, FOLDER / "qwenvl/train" / SCRIPT.get(name, "train_qwen.py"), *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.model_type == "qwen3_vl"
    assert AutoProcessor.from_pretrained(tmp_path).chat_template
