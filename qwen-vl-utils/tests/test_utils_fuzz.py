"""A short run of fuzz_media.py: damaged media give a result or one MediaError; the harness sees all else."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("fuzz_media.py")


def fuzz(folder, *options):
    command = [sys.executable, SCRIPT, "--output", folder / "report.json", "--findings", folder / "findings"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert (folder / "report.json").is_file(), done.stderr
    return done.returncode, json.loads((folder / "report.json").read_text())


def test_damaged_media_give_a_result_or_one_error(tmp_path):
    code, report = fuzz(tmp_path, "--inputs", "700", "--seed", "7", "--workers", "1")
    assert report["findings"] == []
    assert code == 0
    assert report["inputs"] == 700
    picture, video = report["outcomes"]["picture"], report["outcomes"]["video"]
    # Neither all refused nor all read: the damage goes as deep as the decoders.
    assert picture["picture"] > 50 and picture["ImageError"] > 50
    assert video["video"] > 30 and video["VideoError"] > 30


def test_harness_finds_what_is_planted(tmp_path):
    code, report = fuzz(tmp_path, "--planted", "--inputs", "400", "--workers", "1")
    assert code == 1
    found = {finding.get("index"): finding["outcome"] for finding in report["findings"]}
    assert found == {
        5: "!KeyError",
        9: "!died with status -6",
        13: "!hang",
        17: "!UserWarning",
        None: "!memory grows",
    }
    kept = sorted(path.name for path in (tmp_path / "findings").iterdir())
    assert len(kept) == 8  # the input and what it did, of each but the growth


def test_an_input_is_made_again_from_its_index(tmp_path):
    (tmp_path / "first").mkdir()
    _, report = fuzz(tmp_path / "first", "--planted", "--inputs", "10", "--workers", "1")
    first = Path(next(f["file"] for f in report["findings"] if f["index"] == 5)).read_bytes()
    (tmp_path / "again").mkdir()
    _, report = fuzz(tmp_path / "again", "--planted", "--only", "5", "--workers", "1")
    assert Path(report["findings"][0]["file"]).read_bytes() == first
