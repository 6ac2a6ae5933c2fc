"""ZeRO splits the state of training over the processes and takes the same steps.

ZeRO-3 with adapters is tried on preferences: a step runs the model twice, and the base is merged at the end.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import qwenvl.train

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
SCRIPT = PACKAGE / "qwenvl" / "train" / "train_qwen.py"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
        reason="the extra `deepspeed` and a C++ compiler are needed; CI installs both: uv pip install -e "
        "'qwen-vl-finetune[deepspeed]'",
    ),
    pytest.mark.timeout(600),  # DeepSpeed compiles its first operator for a minute.
]


def train(script: Path, output: Path, checkpoint: Path, *more: str) -> list[float]:
    """Losses of four steps of two processes on the demo pictures, every component trained."""
    flags = ["--model_name_or_path", checkpoint, "--dataset_config", PACKAGE / "demo" / "datasets.toml"]
    flags += ["--dataset_use", "single_images", "--output_dir", output, "--data_flatten", "True"]
    flags += ["--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--tune_mm_vision", "True"]
    flags += ["--per_device_train_batch_size", "3", "--max_steps", "4", "--learning_rate", "1e-3"]
    flags += ["--logging_steps", "1", "--report_to", "none", "--save_strategy", "no", *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


@pytest.fixture(scope="module")
def plain(checkpoints, tmp_path_factory) -> tuple[list[float], dict]:
    folder = tmp_path_factory.mktemp("plain")
    return train(SCRIPT, folder, checkpoints["qwen3_vl"]), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_takes_the_steps_of_plain_processes(stage, plain, checkpoints, tmp_path, in_pieces):
    """With logits in pieces, of which the processes have unlike many; the plain ones compute all at once."""
    losses, weights = plain
    settings = PACKAGE / "scripts" / f"{stage}.json"
    found = train(in_pieces, tmp_path, checkpoints["qwen3_vl"], "--deepspeed", str(settings))
    assert found == pytest.approx(losses, rel=1e-4)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) - set(weights) <= {"lm_head.weight"}  # A tied head may be written twice, never another.
    assert set(weights) <= set(saved)
    for name, weight in weights.items():
        assert (saved[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-6, name


def prefer(output: Path, processes: int, batch: int, *more: object) -> list[float]:
    """Losses of six steps and the evaluation after them: demo's pairs, adapters, a vision tower in full."""
    flags = ["--model_name_or_path", PACKAGE.parent / "models" / "qwen3-vl-nano", "--output_dir", output]
    flags += ["--dataset_config", PACKAGE / "demo" / "datasets.toml", "--dataset_use", "preferences"]
    flags += ["--eval_dataset_use", "preferences", "--lora_enable", "True", "--lora_components", "language"]
    flags += ["--lora_r", "4", "--tune_mm_vision", "True", "--per_device_train_batch_size", batch]
    flags += ["--max_steps", "6", "--learning_rate", "1e-3", "--logging_steps", "1", "--report_to", "none"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(PACKAGE / "qwenvl" / "train" / "train_dpo.py"), *map(str, [*flags, *more])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [
        line.get("loss", line.get("eval_loss")) for line in history if {"loss", "eval_loss"} & line.keys()
    ]


def test_zero3_with_adapters_takes_the_steps_of_one_process(tmp_path):
    alone = prefer(tmp_path / "alone", 1, 4)
    assert len(alone) == 7 and alone[-1] < 0.5 < alone[0]
    settings = PACKAGE / "scripts" / "zero3.json"
    assert prefer(tmp_path / "split", 2, 2, "--deepspeed", settings) == pytest.approx(alone, abs=1e-4)
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("split", "alone"))
    for name, weight in expected.items():
        assert (merged[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-6, name
