"""Muon for matrices, AdamW for all else: equal to both by themselves, resumed exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW, Muon

from qwenvl.nano import nano_model
from qwenvl.train import muon
from qwenvl.train.argument import TrainingArguments
from qwenvl.train.muon import MuonAndAdamW
from qwenvl.train.parameters import Component, is_layer_matrix, parameter_groups

PACKAGE = Path(__file__).resolve().parents[1]
BETAS = (0.9, 0.98)


def layers(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 6))


def groups_of(model, rate: float) -> list[dict]:
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    return [
        {"params": matrices, "muon": True, "lr": rate, "weight_decay": 0.1},
        {"params": others, "lr": rate / 2, "weight_decay": 0.0},
    ]


def take(model, optimisers, steps: range, rates=()) -> None:
    for step in steps:
        inputs = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        for schedule in rates:
            schedule.step()


def scheduled(optimiser):
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))


def test_the_steps_are_those_of_muon_and_adamw_by_themselves():
    one, other = layers(), layers()
    together = MuonAndAdamW(groups_of(one, 0.02), betas=BETAS)
    (matrices, others) = groups_of(other, 0.02)
    del matrices["muon"]
    apart = [Muon([matrices], adjust_lr_fn="match_rms_adamw"), AdamW([others], betas=BETAS, fused=True)]
    take(one, [together], range(5), [scheduled(together)])
    take(other, apart, range(5), [scheduled(optimiser) for optimiser in apart])
    start = layers()
    for mine, theirs, first in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        # PyTorch's Muon rounds to bf16, which 2^-8 apart numbers are one of.
        assert (mine - theirs).norm() < 0.02 * (theirs - first).norm()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 20, 12), (1, 6, 30)])
@pytest.mark.parametrize(("bf16", "near"), [(False, 1e-4), (True, 0.05)])
def test_singular_values_go_through_the_polynomial(shape, bf16, near, monkeypatch):
    """Against an SVD in float64, whose values alone are changed."""
    monkeypatch.setattr(muon, "bf16_hardware", lambda _: "some" if bf16 else None)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = muon.LINEAR * values + muon.CUBIC * values**3 + muon.QUINTIC * values**5
    expected = left * values[:, None] @ right
    found = muon.orthogonalise(matrices, 5, 1e-7)
    assert found.dtype == matrices.dtype
    assert (found - expected).norm() < near * expected.norm()


def test_a_loaded_state_goes_on_as_if_never_stopped():
    straight, stopped = layers(), layers()
    optimiser = MuonAndAdamW(groups_of(straight, 0.02), betas=BETAS)
    take(straight, [optimiser], range(6))
    first = MuonAndAdamW(groups_of(stopped, 0.02), betas=BETAS)
    take(stopped, [first], range(3))
    second = MuonAndAdamW(groups_of(stopped, 0.5), betas=BETAS)
    second.load_state_dict(first.state_dict())
    take(stopped, [second], range(3, 6))
    for mine, theirs in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
def test_embeddings_heads_kernels_and_experts_are_not_muons(family):
    model = nano_model(family, tied=False)
    table = {name: Component(name, True, 0.1, 0.1) for name in ("language", "merger", "vision")}
    groups = parameter_groups(model, table, muon=True)
    names = {id(weight): name for name, weight in model.named_parameters()}
    matrices = {names[id(weight)] for group in groups if group.get("muon") for weight in group["params"]}
    assert {name for name, weight in model.named_parameters() if is_layer_matrix(name, weight)} == matrices
    assert any("mlp" in name for name in matrices) and any("visual.blocks" in name for name in matrices)
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in matrices)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_two_processes_take_the_steps_of_one_by_the_public_command(tmp_path, checkpoints):
    curves = {}
    for processes, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(processes)
        flags = ["--model_name_or_path", checkpoints["qwen3_vl"], "--dataset_use", "single_images"]
        flags += ["--dataset_config", PACKAGE / "demo" / "datasets.toml", "--output_dir", output]
        flags += ["--tune_mm_llm", "True", "--tune_mm_vision", "True", "--muon", "True", "--max_steps", "3"]
        flags += ["--learning_rate", "2e-3", "--logging_steps", "1", "--report_to", "none"]
        flags += ["--save_strategy", "no", "--per_device_train_batch_size", batch]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={processes}", PACKAGE / "qwenvl/train/train_qwen.py", *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("speed: fp32") == 1  # The first process alone says it.
        assert "attention within samples, batched by length through torch's own; " in done.stderr
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        curves[processes] = [line["loss"] for line in history if "loss" in line]
    assert curves[1][-1] < curves[1][0]
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)


def test_split_weights_are_refused(tmp_path):
    settings = str(PACKAGE / "scripts" / "zero2.json")
    with pytest.raises(ValueError, match="--muon True needs whole matrices"):
        TrainingArguments(output_dir=str(tmp_path), muon=True, deepspeed=settings)
