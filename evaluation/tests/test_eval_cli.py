"""qwenvl-eval by its commands, with a nano checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_serve import GREEDY, open_backend
from qwenvl.nano import write_checkpoint
from qwenvl_eval import load_samples, read_predictions
from qwenvl_eval.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint("qwen3_vl", tmp_path_factory.mktemp("checkpoints") / "qwen3_vl")


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Three pictures with three questions each; "is it red?" is always answered by "can"."""
    folder = tmp_path_factory.mktemp("questions")
    random = np.random.default_rng(0)
    rows = []
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        for question, answer in (("is it red?", "can"), ("what is it?", "a dog"), ("how many?", str(number))):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"image": f"{number}.png", "conversations": turns})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json"


def run_flags(checkpoint, questions, output, *more):
    flags = ["--model-path", str(checkpoint), "--annotations", str(questions), "--output-file", str(output)]
    return ["run", *flags, "--max-new-tokens", "2", *more]


def test_run_asks_everything_once_and_score_says_the_same_again(checkpoint, questions, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    command = [str(Path(sys.executable).with_name("qwenvl-eval"))]
    command += run_flags(checkpoint, questions, output, "--batch-size", "4", "--device", "cpu")
    first = subprocess.run(command, capture_output=True, text=True, check=True, timeout=170)
    assert "9/9" in first.stderr  # the progress bar
    run, predictions = read_predictions(output)
    samples = load_samples(questions, questions.parent)
    backend = open_backend(checkpoint, device="cpu")
    replies = [backend.generate([s.messages], GREEDY)[0] for s in samples]
    for sample, reply, kept in zip(samples, replies, predictions, strict=True):
        assert (kept.row, kept.target, kept.media) == (sample.row, sample.target, list(sample.media))
        assert kept.prompt_tokens == reply.prompt_tokens
        assert reply.text.startswith(kept.answer) and kept.completion_tokens <= 2
    assert run.samples == 9
    before = output.read_bytes()
    assert main(["score", str(output)]) == 0
    assert capsys.readouterr().out == first.stdout
    assert "9 about 3 pictures" in first.stdout
    assert main(run_flags(checkpoint, questions, output)) == 0  # nothing is left to ask
    assert output.read_bytes() == before


def test_score_beside_answering_without_looking(checkpoint, questions, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(run_flags(checkpoint, questions, output, "--limit", "6", "--device", "cpu")) == 0
    capsys.readouterr()
    assert main(["score", str(output), "--train-annotations", str(questions)]) == 0
    # Two of the six rows ask "how many?", which training answers by 0, 1 and 2: one of them can be right.
    assert "without looking  83.3 % [" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_one_line(checkpoint, questions, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(run_flags(checkpoint, questions, output, "--limit", "3", "--device", "cpu")) == 0
    cases = [
        (
            run_flags(checkpoint, questions, output),
            "holds the predictions of another run (samples 3 there, 9",
        ),
        (run_flags(checkpoint, questions.parent / "0.png", tmp_path / "new"), "the name must end in .json"),
        (run_flags(tmp_path, questions, tmp_path / "new.jsonl"), "config.json is missing"),
        (["score", str(tmp_path / "nowhere.jsonl")], "No such file"),
    ]
    lines = output.read_text().splitlines(keepends=True)
    (tmp_path / "partial.jsonl").write_text("".join(lines[:-1]))
    cases.append((["score", str(tmp_path / "partial.jsonl")], "2 of 3 predictions are there"))
    capsys.readouterr()
    for arguments, told in cases:
        assert main(arguments) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("qwenvl-eval: ") and told in error, error
    with pytest.raises(SystemExit):
        main(run_flags(checkpoint, questions, output, "--batch-size", "0"))
    assert "0: give a whole number from 1 up" in capsys.readouterr().err
