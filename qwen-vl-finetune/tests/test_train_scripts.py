"""Every launch script runs on a small model of its family; a Slurm job's machines are played by this one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import qwenvl.train
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.train_qwen import build_trainer

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
SCRIPTS = PACKAGE / "scripts"
# What a script's name says of its model, the most special first.
FAMILIES = {"30a3b": "qwen3_vl_moe", "7b": "qwen2_5_vl", "32b": "qwen2_5_vl", "": "qwen3_vl"}
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
SMALL += ["--min_pixels", "3136", "--max_pixels", "12544", "--disable_tqdm", "True"]


def run(script: Path, checkpoint: Path, output: Path, **environment: str) -> None:
    """The script with its model replaced; afterwards a model and two losses lie in `output`."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"MODEL": str(checkpoint), "OUTPUT": str(output), "NPROC_PER_NODE": "1", "PATH": binaries}
    done = subprocess.run(
        [script, *SMALL],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables | environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert len([line["loss"] for line in history if "loss" in line]) == 2
    assert (output / "model.safetensors").is_file()


@pytest.mark.timeout(600)  # DeepSpeed compiles its first operator for a minute or two.
@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("sft*.sh")), ids=lambda script: script.stem)
def test_every_script_trains(script, checkpoints, tmp_path):
    needed = "--deepspeed" in script.read_text()
    if needed and (importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None):
        pytest.skip("the extra `deepspeed` and a C++ compiler are needed; CI installs both")
    family = next(family for mark, family in FAMILIES.items() if mark in script.stem)
    run(script, checkpoints[family], tmp_path / "output")


@pytest.mark.timeout(600)
def test_slurm_starts_every_machine(checkpoints, tmp_path):
    """Two machines, which must find each other; `srun` and `scontrol` are played."""
    stubs = {
        "srun": 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
        "scontrol": "echo localhost; seq 20000",  # More names than a pipe holds: all must be read.
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,elsewhere"}
    job |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(PACKAGE.parent)}
    copy = tmp_path / "slurm_script"
    shutil.copy(SCRIPTS / "slurm.sh", copy)  # As Slurm does.
    run(copy, checkpoints["qwen3_vl"], tmp_path / "output", PATH=path, **job)
    used = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    assert used["train_batch_size"] == 1
    assert used["num_train_epochs"] == 1


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_files_leave_the_command_line_in_charge(name):
    settings = json.loads((SCRIPTS / f"{name}.json").read_text())
    assert not {"optimizer", "scheduler"} & set(settings)
    assert settings["gradient_clipping"] == settings["gradient_accumulation_steps"] == "auto"
    assert settings["train_batch_size"] == settings["train_micro_batch_size_per_gpu"] == "auto"
    assert {settings[kind]["enabled"] for kind in ("bf16", "fp16")} == {"auto"}


def test_accelerate_reads_the_fsdp_file():
    config = load_config_from_file(str(SCRIPTS / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("kind", ["sp_size", "cp_size", "tp_size"])
def test_samples_split_over_processes_are_refused(kind, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}", "2")
    model_args = ModelArguments(model_name_or_path=str(checkpoints["qwen3_vl"]))
    data_args = DataArguments(
        dataset_use="single_images", dataset_config=str(PACKAGE / "demo" / "datasets.toml")
    )
    with pytest.raises(ValueError, match=f"{kind}=2.*zero3.json"):
        build_trainer(model_args, data_args, TrainingArguments(output_dir=str(tmp_path), report_to="none"))
