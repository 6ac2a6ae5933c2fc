"""qwenvl-eval by its commands, with a nano checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from qwen_vl_serve import GREEDY, open_backend
from qwen_vl_utils import processor_inputs
from qwenvl.nano import write_checkpoint
from qwenvl_eval import Predictions, task_names
from qwenvl_eval.cli import main
from qwenvl_eval.tasks.conversations import Conversations


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
        Image.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        for question, answer in (("is it red?", "can"), ("what is it?", "a dog"), ("how many?", str(number))):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"image": f"{number}.png", "conversations": turns})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json"


def words(checkpoint, questions, output, *more, command="run"):
    flags = ["--model-path", str(checkpoint), "--data-dir", str(questions), "--output-file", str(output)]
    flags += ["--device", "cpu", "--engine", "transformers", "--max-new-tokens", "2"]
    return [command, "conversations", *flags, *more]


@pytest.fixture(scope="module")
def answered(checkpoint, questions, tmp_path_factory):
    """The predictions of all nine questions, and what the command said."""
    output = tmp_path_factory.mktemp("answered") / "out.jsonl"
    command = [str(Path(sys.executable).with_name("qwenvl-eval"))]
    command += words(checkpoint, questions, output, "--batch-size", "4")
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=170)
    assert "9/9" in done.stderr  # the progress bar
    return output, done.stdout


def test_run_asks_everything_once_and_score_says_the_same_again(answered, checkpoint, questions, capsys):
    output, said = answered
    found = Predictions(output)
    samples = list(Conversations().open(questions))
    backend, processor = open_backend(checkpoint, device="cpu"), AutoProcessor.from_pretrained(checkpoint)
    replies = [backend.generate([s.messages], GREEDY)[0] for s in samples]
    for sample, reply, kept in zip(samples, replies, found, strict=True):
        assert (kept.id, kept.target, kept.cluster) == (sample.id, sample.target, sample.cluster)
        assert kept.prompt_tokens == reply.prompt_tokens
        assert reply.text.startswith(kept.answer) and kept.completion_tokens <= 2
        inputs = processor_inputs(processor, [sample.messages], add_generation_prompt=True)
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        assert kept.media == [{"height": 16 * rows, "width": 16 * columns, "source": [64, 96]}]
    assert found.run.samples == 9 and found.run.sampling["temperature"] == 0
    before = output.read_bytes()
    assert main(["score", str(output)]) == 0
    assert said == capsys.readouterr().out + f"page             {output.with_suffix('.html')}\n"
    assert "9 about 3 pictures" in said
    assert main(words(checkpoint, questions, output)) == 0  # nothing is left to ask
    assert output.read_bytes() == before


def test_score_beside_answering_without_looking(checkpoint, questions, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(words(checkpoint, questions, output, "--limit", "6")) == 0
    capsys.readouterr()
    assert main(["score", str(output), "--train-annotations", str(questions)]) == 0
    # Two of the six rows ask "how many?", which training answers by 0, 1 and 2: one of them can be right.
    assert "without looking  83.3 % [" in capsys.readouterr().out


def test_a_run_is_made_again_from_its_file_and_refused_where_something_differs(
    answered, checkpoint, questions, tmp_path, capsys
):
    output, _ = answered
    device = ["--device", "cpu"]
    again = tmp_path / "again.jsonl"
    assert main(["reproduce", str(output), "--output-file", str(again), *device]) == 0
    assert "9 of 9 answers are the same" in capsys.readouterr().out
    other = write_checkpoint("qwen3_vl", tmp_path / "other")
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "\n")
    new = str(tmp_path / "new.jsonl")
    refused = [
        (["--model-path", str(other)], "weights"),
        (["--data-dir", str(changed(questions))], "data_sha256"),
    ]
    for flags, told in refused:
        assert main(["reproduce", str(output), "--output-file", new, *flags, *device]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "can't be made again" in error and told in error
    lines = output.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    header["run"]["versions"]["torch"] = "1.0"
    old = tmp_path / "old.jsonl"
    old.write_text(json.dumps(header) + "\n" + "".join(lines[1:]))
    assert main(["reproduce", str(old), "--output-file", new, *device]) == 1
    assert "torch 1.0 there" in capsys.readouterr().err
    assert main(["reproduce", str(old), "--output-file", new, "--other-versions", *device]) == 0


def test_a_changed_picture_is_noticed_when_a_run_is_made_again(checkpoint, questions, tmp_path, capsys):
    copy = tmp_path / "data"
    copy.mkdir()
    for path in questions.parent.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "out.jsonl"
    assert main(words(checkpoint, copy / "test.json", output, command="infer")) == 0
    Image.new("RGB", (64, 96)).save(copy / "1.png")
    again = ["reproduce", str(output), "--output-file", str(tmp_path / "again.jsonl"), "--device", "cpu"]
    assert main(again) == 1
    assert "was asked with other media" in capsys.readouterr().err


def test_a_changed_picture_is_asked_about_again_and_nothing_else(checkpoint, questions, tmp_path):
    copy = tmp_path / "data"
    copy.mkdir()
    for path in questions.parent.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "out.jsonl"
    command = words(checkpoint, copy / "test.json", output, command="infer")
    assert main(command) == 0
    before = {p.id: p.key for p in Predictions(output)}
    Image.new("RGB", (64, 96)).save(copy / "1.png")
    assert main(command) == 0
    after = {p.id: p.key for p in Predictions(output)}
    assert {id for id in before if before[id] != after[id]} == {"3", "4", "5"}
    assert output.read_bytes().count(b"\n") == 1 + 9 + 3


def test_no_command_writes_over_predictions(answered, checkpoint, capsys):
    output, _ = answered
    before = output.read_bytes()
    for command in (["score"], ["reproduce", "--device", "cpu"], ["compare", str(output)]):
        assert main([*command, str(output), "--output-file", str(output)]) == 1
        assert "--output-file would overwrite it" in capsys.readouterr().err
        assert output.read_bytes() == before


def changed(questions):
    rows = json.loads(questions.read_text())
    rows[0]["conversations"][1]["value"] = "a cat"
    path = questions.with_name("changed.json")
    path.write_text(json.dumps(rows))
    return path


def test_a_task_of_ones_own_is_one_file(checkpoint, questions, tmp_path, capsys):
    file = tmp_path / "shouting.py"
    file.write_text('''
"""Every answer in capitals."""
from dataclasses import dataclass
from qwenvl_eval import Dataset, Sample, Task, option
from qwenvl_eval.scoring import Outcome, Verdict

def shouted(answer, target):
    return Verdict(Outcome.RIGHT if answer.isupper() else Outcome.WRONG, answer)

@dataclass(frozen=True)
class Shouting(Task):
    title = "Shouting"
    protocols = {"capitals": shouted}
    word: str = option("HELLO", "what to say")

    def open(self, data):
        sample = Sample("1", [{"role": "user", "content": f"Say {self.word}"}], {}, "1")
        return Dataset((), 1, lambda: iter([sample]))
''')
    command = words(checkpoint, questions, tmp_path / "out.jsonl", "--word", "WORLD")
    assert main([command[0], str(file), *command[2:]]) == 0
    assert "(capitals; 95 % interval)" in capsys.readouterr().out
    (kept,) = Predictions(tmp_path / "out.jsonl")
    assert kept.prompt == [{"role": "user", "content": "Say WORLD"}]
    assert main(["score", str(tmp_path / "out.jsonl")]) == 0


def test_list_names_every_task(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert {"conversations", "easyvqa"} <= set(task_names())
    assert all(name in out for name in task_names())


def test_what_is_wrong_is_said_in_one_line(checkpoint, questions, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(words(checkpoint, questions, output, "--limit", "3", command="infer")) == 0
    plain = words(checkpoint, questions, output)
    cases = [
        (plain, "holds the predictions of another run (options {'limit': 3} there, {'limit': 0} here"),
        (words(checkpoint, questions.parent / "0.png", tmp_path / "new"), "the name must end in .json"),
        (words(tmp_path, questions, tmp_path / "new.jsonl"), "config.json is missing"),
        (["score", str(tmp_path / "nowhere.jsonl")], "No such file"),
        (["score", str(output), "--protocol", "loud"], "has no protocol 'loud'; it has exact"),
        ([plain[0], "mmlu", *plain[2:]], "no task is called 'mmlu'; there are "),
        ([plain[0], "gone.py", *plain[2:]], "gone.py: no such file"),
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
        main(words(checkpoint, questions, output, "--batch-size", "0"))
    assert "0: give a whole number from 1 up" in capsys.readouterr().err


def test_without_data_it_says_where_data_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LMUData", raising=False)
    flags = ["--model-path", str(checkpoint), "--output-file", str(tmp_path / "out.jsonl")]
    assert main(["infer", "conversations", *flags]) == 1
    assert "--data-dir, or with the variable LMUData" in capsys.readouterr().err
