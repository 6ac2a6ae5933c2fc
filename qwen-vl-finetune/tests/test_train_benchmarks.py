"""The benchmarks of fine-tuning run: what they compare agrees, and their result says where it comes from."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenvl.data.flops import MultiplyAdds
from qwenvl.nano import nano_config, nano_tokenizer

pytestmark = pytest.mark.timeout(600)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("bench_data", "--quick"),
        ("bench_pack", "--quick"),
        ("bench_train", "--quick"),
        ("bench_cpu", "--quick"),
        ("bench_start", "--quick"),
        ("bench_gpu", "--smoke"),
        ("simulate_stream", "--quick"),
    ],
)
def test_both_sides_agree_and_the_result_is_complete(name, short, tmp_path):
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", short, "--output", output],
        capture_output=True, text=True, timeout=580, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert {"date", "commit", "hardware", "versions", "rounds"} <= set(json.loads(output.read_text()))


def test_a_published_size_needs_a_gpu():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_gpu.py", "--size", "2B"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["roofline", "scale"])
def test_a_prediction_says_where_it_comes_from(name, tmp_path):
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--output", output],
        capture_output=True, text=True, timeout=580, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert {"date", "commit", "hardware", "versions"} <= set(json.loads(output.read_text()))
    page = output.with_suffix(".md").read_text()
    assert "No GPU" in page and "| ---" in page


@pytest.fixture
def predictions(monkeypatch):
    """The modules step_trace, roofline and scale."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return tuple(importlib.import_module(name) for name in ("step_trace", "roofline", "scale"))


@pytest.fixture
def nano():
    config = nano_config("qwen3_vl", nano_tokenizer("qwen3_vl"))
    config.text_config.num_hidden_layers, config.vision_config.depth = 7, 6  # More than are traced.
    return config


def test_the_kernels_of_a_step_do_the_operations_of_the_formula(predictions, nano):
    step_trace, roofline, _ = predictions
    batch = roofline.pack_of(nano, 1)
    traced = {kept: step_trace.trace(nano, batch, checkpointing=not kept).kernels for kept in (True, False)}

    def operations(moment, kind, kept):
        chosen = (one for one in traced[kept] if one.moment == moment and one.kind.startswith(kind))
        return sum(one.times * one.operations for one in chosen)

    cost, numbers = MultiplyAdds.of(nano), step_trace.Numbers.of(batch, nano)
    pairs = 2 * cost.square * numbers.token_pairs + cost.frame_square * numbers.patch_pairs
    expected = roofline.forward_products(nano, batch)
    for kept in (True, False):
        assert operations("forward", "products", kept) == pytest.approx(expected)
        assert operations("forward", "attention", kept) == pytest.approx(2 * pairs)
        # The patch embedding has no gradient to hand on.
        embedding = 2 * numbers.patches * 1536 * nano.vision_config.hidden_size
        assert operations("backward", "products", kept) == pytest.approx(2 * expected - embedding)
    assert (
        operations("recomputed", "", True) == 0 < operations("recomputed", "", False) < expected + 2 * pairs
    )


def test_bytes_of_a_cast_and_of_a_broadcast(predictions):
    step_trace, _, _ = predictions
    model = torch.nn.Linear(4, 4, bias=False)
    counter = step_trace.Counter(model, None, {})
    with counter.watching(model), torch.no_grad():
        model.weight.to(torch.bfloat16)
        torch.add(torch.ones(8, 1).expand(8, 16), torch.ones(8, 16))
        torch.ones(8, 16).view(16, 8)
    cast, added = (
        next(one for one in counter.kernels if name in one.operator) for name in ("_to_copy", "add")
    )
    assert (cast.kind, cast.bytes) == ("casts of weights", 16 * (4 + 2))
    assert added.bytes == 4 * (8 + 128 + 128)
    assert not any("view" in one.operator for one in counter.kernels)


def test_memory_by_sharding(predictions):
    *_, scale = predictions
    model = scale.Model(parameters=8e9, layer=2e8, ends=1e9, layers=36)
    assert len({scale.state_bytes(model, sharding, 1) for sharding in scale.SHARDINGS}) == 1
    for gpus in (8, 64, 1024):
        ddp, zero2, zero3 = (scale.state_bytes(model, sharding, gpus) for sharding in scale.SHARDINGS)
        assert ddp > zero2 > zero3
    assert scale.state_bytes(model, "ZeRO-3", 64) > scale.state_bytes(model, "ZeRO-3", 256) > 6e9


def test_a_step_is_longer_with_more_to_send(predictions):
    *_, scale = predictions
    model, fabric = scale.Model(parameters=8e9, layer=2e8, ends=1e9, layers=36), scale.Fabric()
    for sharding in scale.SHARDINGS:
        steps = [scale.step_seconds(0.1, 0.2, model, sharding, gpus, fabric) for gpus in (1, 8, 64, 1024)]
        assert steps == sorted(steps) and steps[0] == (pytest.approx(0.3), 0.0)
        seconds, shown = scale.step_seconds(9.0, 18.0, model, sharding, 64, fabric)
        slower, _ = scale.step_seconds(9.0, 18.0, model, sharding, 64, scale.Fabric(port=5e9))
        assert 0 < shown < 1 and seconds == pytest.approx(27 + shown) and slower > seconds
    # 16 GB pass a GPU's NVLink of 450 GB/s, but for the eighth that it has.
    assert fabric.seconds(16e9, 8, 0) == pytest.approx(16e9 * 7 / 8 / 450e9)


def test_the_fitted_row_is_met(predictions):
    *_, scale = predictions
    first = scale.published()[0]
    efficiency = scale.calibrated(first)
    assert 0.2 < efficiency < 0.5
    assert scale.predicted(first, efficiency) == pytest.approx(first.tokens_per_second, rel=1e-3)
    assert scale.predicted(first, 1.1 * efficiency) > first.tokens_per_second
