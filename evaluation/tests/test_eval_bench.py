"""The benchmark of the harness runs, compares before it times, and says where its numbers come from."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/bench_eval.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_eval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as when it runs as a script
        spec.loader.exec_module(module)
    return module


def test_both_sides_agree_and_the_result_is_complete(tmp_path):
    output = tmp_path / "eval.json"
    subprocess.run([sys.executable, SCRIPT, "--quick", "--output", output], check=True, timeout=250)
    report = json.loads(output.read_text())
    assert {"date", "commit", "hardware", "versions", "goal_share_of_bare", "goal_growth_mib"} <= set(report)
    found = report["throughput"]
    assert found["equal_answers"] == 2 * found["requests"] == 384
    assert 45_000 < found["picture_bytes"] < 55_000
    waves = found["requests"] / found["at_once"]
    for side in ("bare", "runner"):
        one = found[side]
        assert len(one["seconds"]) == report["rounds"] == 2
        # by the stub's clock: less would mean that some weren't asked, or more at once
        assert min(one["seconds"]) >= waves * found["latency_seconds"]
        assert one["lowest"] <= one["share_of_bare"] <= one["highest"]
        assert one["cpu_ms_per_request"] > 0
    assert found["bare"]["lowest"] == found["bare"]["highest"] == 1
    for name, count in (("inside", 3_000), ("endpoint", 600)):
        one = report["memory"][name]
        assert one["samples"] == one["right_answers"] == count
        assert [done for done, _ in one["resident_mib"]] == list(range(0, count + 1, count // 20))
        assert all(memory > 1 for _, memory in one["resident_mib"])
        assert 0 < one["finished_keys_mib"] < one["reopening_peak_mib"]


def rounds(bench, seconds):
    return {
        name: iter([bench.Round(["a", "b"], s, s / 2) for s in [9, *kept]]) for name, kept in seconds.items()
    }


def test_the_share_pairs_rounds_and_leaves_out_the_warm_one(bench):
    sides = rounds(bench, {"bare": [1.0, 2.0, 3.0], "runner": [2.0, 2.0, 4.0]})
    found = bench.measure({name: lambda left=left: next(left) for name, left in sides.items()}, 2, 3)
    assert (found["runner"]["lowest"], found["runner"]["share_of_bare"]) == (0.5, 0.75)
    assert found["runner"]["highest"] == 1
    assert found["runner"]["requests_per_second"] == 1
    assert found["bare"]["cpu_ms_per_request"] == 500


def test_nothing_is_timed_where_answers_are_missing_on_both_sides(bench):
    short = bench.Round(["a"], 1.0, 1.0)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.measure({"bare": lambda: short, "runner": lambda: short}, 2, 3)


@pytest.mark.parametrize("other", [["a", "c"], ["b", "a"], ["a"]])
def test_nothing_is_timed_where_answers_differ(bench, other):
    asked = []

    def side(name, answers):
        def ask():
            asked.append(name)
            return bench.Round(answers, 1.0, 1.0)

        return ask

    with pytest.raises(SystemExit, match="runner gives other answers than bare"):
        bench.measure({"bare": side("bare", ["a", "b"]), "runner": side("runner", other)}, 2, 3)
    assert asked == ["bare", "runner"]


def test_growth_begins_after_the_first_tenth_and_sees_a_peak_that_went(bench):
    readings = [[0, 10.0], [50, 80.0], [100, 81.0], [500, 95.0], [1000, 82.0]]
    assert bench.growth(readings) == 14
    assert bench.growth([[0, 10.0], [50, 90.0], [100, 81.0], [500, 80.0], [1000, 79.0]]) == 0


LEAKING = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import bench_eval

kept, real = [], bench_eval.infer

def leaking(backend, data, store, sampling, **options):
    def walk():
        for sample in data:
            kept.append(bytearray(b"x" * 50_000))
            yield sample

    return real(backend, bench_eval.Dataset((), len(data), walk), store, sampling, **options)

bench_eval.infer = leaking
print(bench_eval.memory(2_000, "", Path(sys.argv[2]))["growth_mib"])
"""


def test_a_run_that_keeps_its_samples_shows(bench, tmp_path):
    """In a process of its own: here the memory of earlier tests would be used again, and nothing grow."""
    command = [sys.executable, "-c", LEAKING, str(SCRIPT.parent), str(tmp_path)]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert grown > 0.8 * 1_800 * 50_000 / bench.MIB
