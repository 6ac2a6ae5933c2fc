"""What a training leaves behind: a folder that answers anywhere, and checkpoints to go on from."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from qwenvl.data.data_processor import SupervisedDataset
from qwenvl.train import checkpoints as module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.callbacks import Clock
from qwenvl.train.checkpoints import checkpoint_to_resume, defect, rotate, seal, unseal
from qwenvl.train.train_qwen import train

PROJECT = Path(module.__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index in range(12):
        turns = [{"from": "human", "value": f"<image>Which, {index}?"}]
        turns.append({"from": "gpt", "value": "this " * (1 + index % 5)})
        rows.append({"image": "abc"[index % 3] + ".png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.toml").write_text(f'[rows]\nannotation_path = "rows.json"\ndata_path = "{pictures}"\n')
    return folder / "data.toml"


@pytest.fixture
def run(checkpoints, dataset, tmp_path):
    """Train qwen3_vl: 6 steps in 3 epochs of 2 steps, into tmp_path/NAME; returns the trainer."""

    def start(name: str, family: str = "qwen3_vl", **flags):
        parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
        defaults = dict(
            model_name_or_path=str(checkpoints[family]), output_dir=str(tmp_path / name),
            dataset_config=str(dataset), dataset_use="rows", data_flatten=True,
            tune_mm_llm=True, tune_mm_mlp=True, tune_mm_vision=True,
            min_pixels=3136, max_pixels=6400, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            learning_rate=1e-3, lr_scheduler_type="cosine", warmup_ratio=0.2, num_train_epochs=3,
            logging_steps=1, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        return train(*parser.parse_dict(defaults | flags))

    return start


def curve(trainer) -> list[tuple[float, float, float]]:
    history = [line for line in trainer.state.log_history if "loss" in line]
    return [(line["loss"], line["grad_norm"], line["learning_rate"]) for line in history]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_the_output_folder_answers_in_another_place(run, family, checkpoints, tmp_path):
    trainer = run("out", family, max_steps=2, video_fps=3.0)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "out", moved)
    model = AutoModelForImageTextToText.from_pretrained(moved)
    processor = AutoProcessor.from_pretrained(moved)

    # Preprocessing is that of training: the pixel limits of the command line.
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (3136, 6400)
    assert (processor.video_processor.fps, processor.video_processor.max_frames) == (3.0, 8)
    picture = Image.new("RGB", (500, 300), "red")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    grid = inputs["image_grid_thw"][0].tolist()
    assert grid[1] * grid[2] * processor.image_processor.patch_size**2 <= 6400
    answer = model.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] > inputs["input_ids"].shape[1]

    # Nothing but the weights has changed, and what made them is written down.
    for file in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (moved / file).read_text() == (checkpoints[family] / file).read_text(), file
    used = json.loads((moved / "training_arguments.json").read_text())
    assert used["model"]["tune_mm_llm"] is True
    assert used["data"]["max_pixels"] == 6400
    assert used["training"]["learning_rate"] == 1e-3
    trained = trainer.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_resuming_gives_the_uninterrupted_curve(run, tmp_path):
    """Stopped in the middle of an epoch; loss, gradient norm, learning rate and weights bit for bit."""
    whole = run("whole")
    run("parts", save_strategy="steps", save_steps=3)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    state = json.loads((tmp_path / "parts" / "checkpoint-3" / "trainer_state.json").read_text())
    resumed = run("parts", save_strategy="steps", save_steps=3)
    assert len(curve(whole)) == 6
    assert curve(resumed) == curve(whole)
    # The first half was not trained again: its log, timings included, is the checkpoint's.
    assert resumed.state.log_history[:3] == state["log_history"]
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_samples_of_steps_done_are_not_opened_again(run, tmp_path, monkeypatch, packed):
    opened: list[int] = []
    load = SupervisedDataset.load
    monkeypatch.setattr(
        SupervisedDataset, "load", lambda self, index: (opened.append(index), load(self, index))[1]
    )
    flags = {"save_strategy": "steps", "save_steps": 2, "data_packing": packed, "data_flatten": not packed}
    flags |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "max_steps": 4}
    run("out", **flags, model_max_length=60)
    everything = opened.copy()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    opened.clear()
    run("out", **flags, model_max_length=60)
    assert opened and opened == everything[-len(opened) :]
    assert len(everything) - len(opened) >= 2 * 2  # Two steps, at least two rows each.


def test_resuming_is_announced_and_skips_damaged_checkpoints(run, tmp_path, caplog):
    run("out", save_strategy="steps", save_steps=2, max_steps=4)
    weights_file = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1000])
    caplog.set_level("INFO", logger="qwenvl")
    run("out", save_strategy="steps", save_steps=2, max_steps=4)
    lines = [record.getMessage() for record in caplog.records if "checkpoint-" in record.getMessage()]
    assert len(lines) == 2
    assert "checkpoint-4 cannot be resumed from (model.safetensors has " in lines[0]
    assert lines[1] == f"going on from {tmp_path / 'out' / 'checkpoint-2'}"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small whole checkpoint, number 5, of a run in tmp_path/run."""
    path = tmp_path / "run" / "checkpoint-5"
    (path / "part").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "part/rng_state_1.pth"):
        (path / name).write_bytes(name.encode() * 100)
    seal(path)
    return path


FILES = ["model.safetensors", "optimizer.pt", "trainer_state.json", "part/rng_state_1.pth", "complete.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "one byte", "other"])
def test_a_damaged_checkpoint_is_not_used(folder, file, damage):
    assert defect(folder) is None
    assert checkpoint_to_resume(str(folder.parent), None) == folder
    path = folder / file
    whole = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "one byte":
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    else:
        path.write_bytes(b"[\xff]")
    reason = defect(folder)
    assert reason and (file in reason or file == "complete.json")
    assert checkpoint_to_resume(str(folder.parent), None) is None
    with pytest.raises(ValueError, match=re.escape(reason)):
        checkpoint_to_resume("elsewhere", str(folder))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint_to_resume(str(folder.parent), "True")


def test_a_seal_of_another_shape_is_damaged(folder):
    for wrong in ('{"optimizer.pt": 1}', '{"optimizer.pt": ["1", 2]}', "[]"):
        (folder / "complete.json").write_text(wrong)
        assert "complete.json is damaged" in (defect(folder) or "")


def test_rotation_keeps_the_last_whole_ones_whatever_lies_above(folder):
    """A run that went on from 5 past damaged checkpoints 8 and 12."""
    for step in (2, 4, 8, 12):
        shutil.copytree(folder, folder.with_name(f"checkpoint-{step}"))
    rotate(folder.parent, 5, 2, best=str(folder.with_name("checkpoint-2")))
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        f"checkpoint-{step}" for step in (12, 2, 4, 5, 8)
    ]
    rotate(folder.parent, 12, 2, best=None)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint-12", "checkpoint-8"]
    rotate(folder.parent, 12, None, best=None)
    assert len(list(folder.parent.iterdir())) == 2


def test_a_folder_without_an_optimiser_is_not_gone_on_from(folder):
    (folder / "optimizer.pt").unlink()
    seal(folder)
    assert "no optimiser" in (defect(folder) or "")
    assert defect(folder.with_name("checkpoint-9")) == "there is no such folder"


def test_a_folder_being_written_anew_is_not_whole(folder):
    unseal(folder)
    assert "not saved to the end" in (defect(folder) or "")


def test_the_newest_checkpoint_is_the_highest_number(folder):
    shutil.copytree(folder, folder.with_name("checkpoint-10"))
    (folder.parent / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(str(folder.parent), None) == folder.with_name("checkpoint-10")
    assert checkpoint_to_resume(str(folder.parent), str(folder)) == folder
    with pytest.raises(ValueError, match="without checkpoints"):
        checkpoint_to_resume(str(folder.parent), "False")


def test_max_minutes_ends_training_and_its_schedule(run, tmp_path, monkeypatch):
    """A minute a step against a limit of 4 minutes: the cosine runs its course in 4 steps of 30."""

    class StepClock(Clock):
        def on_step_begin(self, args, state, control, **kwargs):
            self.steps = state.global_step

        @property
        def seconds(self):
            return 60.0 * getattr(self, "steps", 0)

    monkeypatch.setattr("qwenvl.train.trainer.Clock", StepClock)
    trainer = run("out", num_train_epochs=15, max_minutes=4, warmup_ratio=0.0, save_strategy="steps")
    rates = [rate for _, _, rate in curve(trainer)]
    assert trainer.state.max_steps == 30
    assert len(rates) == 6 and (tmp_path / "out" / "checkpoint-6").is_dir()
    # A step's clock is read when its batch is drawn, and sets the rate of the step after it.
    places = [0, 1, 2, 30 * 1 // 4, 30 * 2 // 4, 30 * 3 // 4]
    assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * place / 30)) for place in places])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_clock_goes_on_after_a_resume(run, tmp_path):
    first = run("out", save_strategy="steps", save_steps=3, max_steps=3, max_minutes=60)
    seconds = first.clock.seconds
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert 0 < state["stateful_callbacks"]["Clock"]["args"]["seconds"] <= seconds
    second = run("out", save_strategy="steps", save_steps=3, max_steps=4, max_minutes=60)
    assert second.clock.before == state["stateful_callbacks"]["Clock"]["args"]["seconds"]
    assert second.state.global_step == 4


def test_a_bad_row_ends_with_one_message_before_training(checkpoints, tmp_path, pictures):
    """Started as users do from qwen-vl-finetune/, with plain python: file and row, no traceback."""
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    rows = [{"image": name, "conversations": turns} for name in ("a.png", "missing.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "data.toml").write_text(f'[rows]\nannotation_path = "rows.json"\ndata_path = "{pictures}"\n')
    command = [sys.executable, "qwenvl/train/train_qwen.py", "--model_name_or_path", checkpoints["qwen3_vl"]]
    command += ["--dataset_use", "rows", "--dataset_config", tmp_path / "data.toml", "--tune_mm_llm", "True"]
    command += ["--output_dir", tmp_path / "out", "--report_to", "none"]
    done = subprocess.run(list(map(str, command)), cwd=PROJECT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("train_qwen:")]
    assert len(message) == 1
    assert "rows.json" in message[0] and "missing.png" in message[0]
