"""What cannot be trained on ends the command at once, with one message that names file and row."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qwenvl.train

SCRIPT = Path(qwenvl.train.__path__[0]) / "train_qwen.py"


def row(image="a.png", question="<image>What is it?", answer="a cat") -> str:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"image": image, "conversations": turns})


FAULTS = {
    "a missing picture": (row(image="nowhere.png"), "nowhere.png: No such file"),
    "a wrong placeholder count": (
        row(image=["a.png", "b.png"]),
        "1 <image> placeholders for 2 entries of 'image'",
    ),
    "broken JSON": ('{"image": "a.png", "conversations', "not valid JSON"),
    "an answer with a tag": (row(answer="a <image>"), "(assistant) contains <image>"),
}


def start(launcher: list[str], bad: str, tmp_path: Path, checkpoint: Path, pictures: Path):
    (tmp_path / "rows.jsonl").write_text(f"{row()}\n{bad}\n{row()}\n")
    (tmp_path / "data.toml").write_text(f'[rows]\nannotation_path = "rows.jsonl"\ndata_path = "{pictures}"\n')
    flags = [
        "--model_name_or_path",
        checkpoint,
        "--dataset_config",
        tmp_path / "data.toml",
        "--dataset_use",
        "rows",
    ]
    flags += [
        "--output_dir",
        tmp_path / "out",
        "--tune_mm_llm",
        "True",
        "--max_steps",
        "1",
        "--report_to",
        "none",
    ]
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode != 0 and not list((tmp_path / "out").glob("*.safetensors"))
    return done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_row_ends_training_before_it_starts(fault, tmp_path, checkpoints, pictures):
    bad, reason = FAULTS[fault]
    printed = start([], bad, tmp_path, checkpoints["qwen3_vl"], pictures)
    (message,) = [line for line in printed.splitlines() if line.startswith("train_qwen:")]
    assert f"{tmp_path}/rows.jsonl: line 2 (counted from 1)" in message and reason in message
    assert "Traceback" not in printed and "training:" not in printed


def test_torchruns_report_ends_with_the_message(tmp_path, checkpoints, pictures):
    bad, reason = FAULTS["a missing picture"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    printed = start(launcher, bad, tmp_path, checkpoints["qwen3_vl"], pictures)
    assert printed.count("\ntrain_qwen:") + printed.startswith("train_qwen:") == 1
    last = [line for line in printed.splitlines() if "traceback" in line][-1]
    assert "rows.jsonl: line 2" in last and reason in last
