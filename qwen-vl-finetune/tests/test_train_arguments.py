"""The command line: flags and defaults of the original, and every flag of Hugging Face."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import HfArgumentParser

from qwenvl.train import speed
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor, stored_dtype

ORIGINAL = {
    "tune_mm_llm": False,
    "tune_mm_mlp": False,
    "tune_mm_vision": False,
    "dataset_use": "",
    "data_packing": False,
    "base_interval": 2,
    "max_pixels": 451584,
    "min_pixels": 12544,
    "video_max_frames": 8,
    "video_min_frames": 4,
    "video_max_pixels": 802816,
    "video_min_pixels": 200704,
    "video_fps": 2,
    "cache_dir": None,
    "model_max_length": 512,
    "mm_projector_lr": None,
    "vision_tower_lr": None,
    "lora_enable": False,
    "lora_r": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.0,
    "warmup_ratio": 0.0,
}


def parse(line: str) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    return parser.parse_args_into_dataclasses(line.split())


def test_the_defaults_are_those_of_the_original():
    """But for what only makes training faster, see below."""
    values = {}
    for arguments in parse("--output_dir out"):
        values |= {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    assert {name: values[name] for name in ORIGINAL} == ORIGINAL


@pytest.mark.parametrize("features", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_the_fast_way_is_the_default_and_a_flag_wins(features, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")  # Set for all other tests, see conftest.py.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    _, data, training = parse("--output_dir out")
    assert data.data_flatten and training.optim == "adamw_torch_fused"
    assert training.bf16 is bool(features) and training.dataloader_num_workers == 0
    line = speed.describe(training, data, "torch's")
    assert (
        f"bf16, which {next(iter(features))} has" if features else "fp32, no fast bf16 is known here"
    ) in line
    assert "samples end to end, no padding" in line and "adamw_torch_fused" in line
    assert not parse("--output_dir out --bf16 False")[2].bf16
    assert parse("--output_dir out --bf16")[2].bf16
    assert not parse("--output_dir out --fp16")[2].bf16
    assert "padded batches" in speed.describe(training, parse("--data_flatten False")[1], "torch's")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not parse("--output_dir out")[2].bf16


@pytest.mark.parametrize(("cores", "processes", "workers"), [(128, 8, 8), (16, 4, 3), (2, 1, 1), (2, 8, 1)])
def test_loader_processes_beside_gpus(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert speed.choose_workers("cuda") == workers
    assert speed.choose_workers("cpu") == 0


@pytest.mark.parametrize("program", ["train/train_qwen.py", "train/train_dpo.py"])
def test_the_help_shows(program):
    done = subprocess.run(
        [sys.executable, Path(speed.__file__).parents[1] / program, "--help"],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "name%50: half" in " ".join(done.stdout.split()) and "--learning_rate" in done.stdout


def test_a_command_of_the_original_is_understood():
    """The flags of its sft.sh, Hugging Face's removed --warmup_ratio among them."""
    model, data, training = parse(
        "--model_name_or_path x --dataset_use a%50,b --data_flatten True --tune_mm_vision False "
        "--tune_mm_mlp True --tune_mm_llm True --bf16 --output_dir out --num_train_epochs 0.5 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 8 --gradient_accumulation_steps 4 "
        "--max_pixels 50176 --min_pixels 784 --eval_strategy no --save_strategy steps --save_steps 1000 "
        "--save_total_limit 1 --learning_rate 2e-7 --weight_decay 0 --warmup_ratio 0.03 --max_grad_norm 1 "
        "--lr_scheduler_type cosine --logging_steps 1 --model_max_length 8192 --gradient_checkpointing True "
        "--dataloader_num_workers 4 --run_name base --report_to none --lora_enable False"
    )
    assert (model.tune_mm_llm, model.tune_mm_vision, data.dataset_use) == (True, False, "a%50,b")
    assert training.get_warmup_steps(1000) == 30
    assert training.bf16 and training.model_max_length == 8192


def test_warmup_steps_win_over_the_ratio():
    assert parse("--warmup_ratio 0.5 --warmup_steps 7")[2].get_warmup_steps(1000) == 7


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5"),
        ("--max_minutes 0", "--max_minutes 0"),
        ("--model_max_length 0", "--model_max_length 0"),
        ("--remove_unused_columns True", "--remove_unused_columns"),
    ],
)
def test_impossible_values_are_named(line, named):
    with pytest.raises(ValueError, match=named):
        parse(line)


def test_every_flag_of_hugging_face_is_kept():
    ours = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for field in dataclasses.fields(transformers.TrainingArguments)} <= ours


def test_limits_that_contradict_are_named(checkpoints):
    arguments = parse(f"--model_name_or_path {checkpoints['qwen3_vl']} --min_pixels 5000 --max_pixels 4000")
    with pytest.raises(ValueError, match="5000 and 4000"):
        load_processor(*arguments)


def test_the_family_comes_from_the_configuration(tmp_path, checkpoints):
    """No folder name decides: this one has an "a" and a family in it."""
    folder = tmp_path / "qwen2_vl-30b-a3b"
    folder.mkdir()
    for file in checkpoints["qwen3_vl"].iterdir():
        (folder / file.name).symlink_to(file)
    model, _, training = parse(f"--model_name_or_path {folder}")
    config = load_config(model, training)
    assert config.model_type == "qwen3_vl"
    assert str(stored_dtype(config)) == "torch.float32"


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    model, _, training = parse(f"--model_name_or_path {tmp_path}")
    with pytest.raises(ValueError, match=r"'llama'.*qwen3_vl"):
        load_config(model, training)


def test_zero3_is_refused_for_linear_attention(tmp_path, checkpoints):
    model_args = ModelArguments(model_name_or_path=str(checkpoints["qwen3_5"]))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    assert load_config(model_args, args).model_type == "qwen3_5"
    args.deepspeed, args.hf_deepspeed_config = "zero3.json", SimpleNamespace(is_zero3=lambda: True)
    with pytest.raises(ValueError, match=r"--deepspeed zero3\.json: ZeRO-3 .* use scripts/zero2\.json"):
        load_config(model_args, args)
