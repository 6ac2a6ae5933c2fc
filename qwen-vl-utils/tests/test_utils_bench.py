"""The benchmark of pictures and videos runs, compares before it times, says where its numbers come from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/bench_preprocess.py"
CASES = ["pictures by path", "pictures as data URLs", "video float32", "video uint8"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("torchcodec")
    output = tmp_path_factory.mktemp("bench") / "preprocess.json"
    command = [sys.executable, SCRIPT, "--quick", "--scale", "small", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "could not be installed" in done.stderr:
        pytest.skip("the release can't be installed here, and .cache/bench_preprocess does not hold it")
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_outputs_were_compared_before_they_were_timed(report):
    assert [case["case"] for case in report["cases"]] == CASES
    by_path, by_url, floats, bytes_ = (case["agreement"] for case in report["cases"])
    assert by_path["ours"]["pictures_bit_equal"] == by_url["ours"]["pictures_bit_equal"] == 3
    for agreement, dtype in ((floats, "torch.float32"), (bytes_, "torch.uint8")):
        assert set(agreement) == {"ours", "ours, pyav"}
        for found in agreement.values():
            assert (found["frames_same_indices"], found["dtypes"]) == (8, [dtype])
            assert found["largest_difference"] <= 1


def test_every_round_of_every_side_is_in_the_report(report):
    for case in report["cases"]:
        for times in case["seconds"].values():
            assert len(times["rounds"]) == 2
            assert times["min"] <= times["median"] <= times["max"]
        assert {"ratio_of_medians", "min_of_rounds", "max_of_rounds", "target"} == set(
            case["compared"]["ours"]["faster"]
        )
        assert {"process", "total", "target"} == set(case["compared"]["ours"]["memory"])
        assert {"process", "total", "at_rest", "workers_at_rest"} == set(case["memory_mib"]["ours"])


def test_report_names_hardware_versions_and_commit(report):
    assert report["hardware"]["cpu"] and report["hardware"]["cores"] and report["hardware"]["memory_gib"]
    assert {"python", "torch", "pillow", "av", "torchcodec", "qwen-vl-utils"} <= set(report["versions"])
    assert report["versions"]["release"] == "0.0.14" != report["versions"]["qwen-vl-utils"]
    assert set(report["commit"]) == {"hash", "dirty"}
    assert report["date"]
    assert report["settings"]["rounds"] == 2
