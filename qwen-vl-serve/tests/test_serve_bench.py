"""The serving benchmark runs, compares before it times, and says where its numbers come from."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/bench_serve.py"


def test_three_ways_agree_before_they_are_timed(tmp_path):
    output = tmp_path / "serve.json"
    command = [sys.executable, SCRIPT, "--quick", "--stub-only", "--output", output]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    report = json.loads(output.read_text())
    assert report["stub"]["equal_answers"] == 3 * report["stub"]["requests"] == 72
    for way in ("bare", "back end", "nginx"):
        found = report["stub"][way]
        assert len(found["seconds"]) == len(found["first_token_seconds"]) == report["rounds"] == 2
        # 24 requests, 8 at once, 0.31 s each by the stub's clock: less would mean that some weren't asked
        assert min(found["seconds"]) >= 3 * 0.31
        assert found["lowest"] <= found["times_bare"] <= found["highest"]
    assert {"commit", "hardware", "versions", "date"} <= set(report)
