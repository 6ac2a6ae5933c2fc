"""A run that is killed, or finds its disk full, goes on as if nothing had been."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qwenvl.train import train_qwen as module
from qwenvl.train.checkpoints import defect

pytestmark = pytest.mark.timeout(900)  # Each of them starts training up to six times.
SCRIPT = Path(module.__file__)
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The TOML file of 40 rows of unlike lengths, most with a picture of their own."""
    folder = tmp_path_factory.mktemp("data")
    chance = np.random.default_rng(0)
    rows = []
    for number in range(40):
        turns = [{"from": "human", "value": f"What is it, {number}?"}]
        turns.append({"from": "gpt", "value": "red star " * (1 + number % 7)})
        row: dict = {"conversations": turns}
        if number % 4:
            name = f"{number}.png"
            noise = chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((64 + 16 * (number % 3), 64)).save(folder / name)
            row["image"] = name
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.toml").write_text('[rows]\nannotation_path = "rows.json"\ndata_path = "."\n')
    return folder / "data.toml"


LAYOUTS = {
    "adapters, packs, workers, two processes": [
        "--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0.3",
        "--data_packing", "True", "--model_max_length", "96", "--dataloader_num_workers", "2",
        "--per_device_train_batch_size", "1",
    ],
    "all weights, padded, one process": [
        "--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--tune_mm_vision", "True",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
    ],
}  # fmt: skip
WORLD = {name: 2 if "two" in name else 1 for name in LAYOUTS}


def command(layout: str, checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    start = [sys.executable]
    if WORLD[layout] > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={WORLD[layout]}", "--master_port=0"]
        start += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return [
        *start, str(SCRIPT), "--model_name_or_path", str(checkpoint), "--output_dir", str(output),
        "--dataset_config", str(data), "--dataset_use", "rows", *LAYOUTS[layout],
        "--min_pixels", "3136", "--max_pixels", "6400", "--learning_rate", "1e-3",
        "--lr_scheduler_type", "cosine", "--max_steps", str(STEPS), "--save_steps", "1",
        "--save_total_limit", "2", "--logging_steps", "1", "--report_to", "none", *more,
    ]  # fmt: skip


def train(*arguments, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, timeout=240, **options
    )


def curve(output: Path) -> list[tuple]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [
        (line["step"], line["loss"], line["grad_norm"], line["learning_rate"])
        for line in history
        if "loss" in line
    ]


def assert_equal(one: Path, other: Path) -> None:
    assert len(curve(one)) == STEPS
    assert curve(one) == curve(other)
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def whole(checkpoints, data, tmp_path_factory):
    """Layout -> the output folder of a run that nothing stopped."""
    done: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in done:
            done[layout] = tmp_path_factory.mktemp("whole") / "run"
            ended = train(layout, checkpoints["qwen3_vl"], data, done[layout])
            assert ended.returncode == 0, ended.stderr[-3000:]
        return done[layout]

    return folder


def kill_after(moment: float, arguments: list[str], output: Path, steps: int) -> bool:
    """Start a run, wait for its checkpoint `steps`, then `moment` seconds more, and SIGKILL all of it.

    Whether it was still running.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (output / f"checkpoint-{steps}").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moment)
        return process.poll() is None
    finally:
        kill_family(process.pid)
        process.wait()


def kill_family(pid: int) -> None:
    """torchrun starts its processes in sessions of their own: find them by their parents."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    children: dict[int, list[int]] = {}
    for line in listed.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    waiting, family = [pid], []
    while waiting:
        family.append(waiting.pop())
        waiting += children.get(family[-1], [])
    for member in family:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_three_moments_a_run_ends_bit_for_bit_the_same(layout, whole, checkpoints, data, tmp_path):
    chance = random.Random(f"{layout} 0")
    output = tmp_path / "run"
    arguments = command(layout, checkpoints["qwen3_vl"], data, output)
    reached = 0
    for _ in range(3):
        # A checkpoint that is not there yet, so that the kill falls into training and not into its start.
        reached = min(reached + chance.choice([1, 2]), STEPS - 1)
        assert kill_after(chance.uniform(0, 0.1), arguments, output, reached), "it had ended already"
        reached = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    ended = train(layout, checkpoints["qwen3_vl"], data, output)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "going on from" in ended.stderr + ended.stdout
    assert_equal(whole(layout), output)


def test_a_full_disk_costs_nothing_that_was_saved(whole, checkpoints, data, tmp_path):
    layout = "all weights, padded, one process"
    output = tmp_path / "run"
    assert kill_after(0, command(layout, checkpoints["qwen3_vl"], data, output), output, 4)
    saved = {path.name for path in output.glob("checkpoint-*") if defect(path) is None}
    assert saved
    # Larger than the weights, smaller than the optimiser: the second large file is cut.
    limit = int(1.5 * (whole(layout) / f"checkpoint-{STEPS}" / "model.safetensors").stat().st_size)
    full = train(
        layout, checkpoints["qwen3_vl"], data, output,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert full.returncode != 0
    assert "could not be saved" in full.stderr and "make room" in full.stderr
    assert "Traceback" not in full.stderr
    assert saved <= {path.name for path in output.glob("checkpoint-*") if defect(path) is None}
    ended = train(layout, checkpoints["qwen3_vl"], data, output)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_equal(whole(layout), output)
