"""The benchmarks of fine-tuning run: what they compare agrees, and their result says where it comes from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("bench_data", "--quick"),
        ("bench_pack", "--quick"),
        ("bench_train", "--quick"),
        ("bench_gpu", "--smoke"),
        ("simulate_stream", "--quick"),
    ],
)
def test_both_sides_agree_and_the_result_is_complete(name, short, tmp_path):
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", short, "--output", output],
        capture_output=True, text=True, timeout=250, env=os.environ | {"HF_HUB_OFFLINE": "1"},
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
