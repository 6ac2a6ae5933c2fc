"""The store and the runner: nothing is lost, nothing asked twice, nothing of another run mixed in."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from PIL import Image

from qwen_vl_serve import Reply
from qwenvl_eval import Prediction, Run, Sample, Store, read_predictions, run_task, summarise
from qwenvl_eval.runner import describe_run

RUN = Run("models/nano", "a" * 64, "test.jsonl", "b" * 64, 3, 16)


def prediction(row, answer="yes", **more):
    fields = {"row": row, "media": [f"{row}.png"], "question": "q", "target": "yes", "answer": answer}
    fields |= {"finish_reason": "stop", "prompt_tokens": 40, "completion_tokens": 2, "seconds": 0.5}
    return Prediction(**(fields | more))


def test_what_is_added_can_be_read_back_in_row_order(tmp_path):
    path = tmp_path / "new folder" / "out.jsonl"
    kept = [prediction(3, answer="Grüße\n\u2028"), prediction(1)]
    with Store(path, RUN) as store:
        store.add(kept)
        assert read_predictions(path) == (RUN, kept[::-1])  # already, before it is closed
    with Store(path, replace(RUN, model_path="moved/elsewhere", annotations="there/too")) as store:
        assert store.done == {1, 3}
        store.add([prediction(2)])
    assert [p.row for p in read_predictions(path)[1]] == [1, 2, 3]


@pytest.mark.parametrize("name", ["weights", "annotations_sha256", "samples", "max_new_tokens"])
def test_another_run_is_refused(tmp_path, name):
    path = tmp_path / "out.jsonl"
    with Store(path, RUN) as store:
        store.add([prediction(1)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"out\.jsonl holds .* another run \({name} .*choose another file"):
        Store(path, replace(RUN, **{name: 7}))
    assert path.read_bytes() == before


def test_a_run_that_never_answered_makes_room_for_another(tmp_path):
    path = tmp_path / "out.jsonl"
    other = replace(RUN, weights="c" * 64)
    for run in (RUN, other):
        Store(path, run).__exit__(None, None, None)
    assert read_predictions(path) == (other, [])


def test_a_file_cut_at_any_byte_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    with Store(path, RUN) as store:
        store.add([prediction(1, answer="ä"), prediction(2)])
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with Store(path, RUN) as store:
            missing = {1, 2} - store.done
            store.add(prediction(row, answer="ä" if row == 1 else "yes") for row in sorted(missing))
        assert path.read_bytes() == whole, end


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "out.jsonl"
    with Store(path, RUN) as store:
        store.add([prediction(1), prediction(2)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:20] + "\n", lines[2]]))
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: not a prediction"):
        Store(path, RUN)
    path.write_text("".join([*lines, lines[2]]))
    with pytest.raises(ValueError, match=r"line 4: row 2 is there twice"):
        Store(path, RUN)
    path.write_text(lines[1])
    with pytest.raises(ValueError, match=r"line 1: not the run"):
        read_predictions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no predictions in it"):
        read_predictions(path)


def test_a_partial_run_has_no_score_and_a_cut_answer_is_wrong():
    some = [prediction(1), prediction(2, finish_reason="length")]
    with pytest.raises(ValueError, match="2 of 3 predictions are there"):
        summarise(RUN, some)
    summary = summarise(RUN, [*some, prediction(3, answer="no")])
    assert (summary.accuracy.right, summary.accuracy.total, summary.truncated) == (1, 3, 1)
    assert summary.samples_per_second == pytest.approx(2.0)
    assert summary.tokens_per_second == pytest.approx(84.0)


def test_the_same_weights_elsewhere_are_the_same_run_and_changed_ones_are_not(tmp_path):
    questions = tmp_path / "test.jsonl"
    questions.write_text("{}\n")
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))
    here, there = (describe_run(str(folder), questions, [], 8) for folder in folders)
    assert here.difference(there) == []
    (folders[1] / "model.safetensors").write_bytes(bytes(500) + b"\1" + bytes(499))
    assert "weights" in here.difference(describe_run(str(folders[1]), questions, [], 8))[0]
    names = [describe_run(name, questions, [], 8) for name in ("Qwen/one", "Qwen/two")]
    assert names[0].weights != names[1].weights


class Recorder:
    """A back end that remembers its batches and answers with the question."""

    def __init__(self):
        self.batches = []

    def generate(self, batch, sampling):
        self.batches.append([messages[-1]["content"] for messages in batch])
        assert sampling.temperature == 0
        return [Reply(str(messages[-1]["content"]), "stop", 5, 2) for messages in batch]


def test_only_missing_questions_are_asked_longest_first(tmp_path):
    texts = ["a" * n for n in (3, 9, 1, 7, 5)]
    samples = [Sample(n, [{"role": "user", "content": t}], t, t, ()) for n, t in enumerate(texts, 1)]
    backend, run = Recorder(), replace(RUN, samples=5)
    with Store(tmp_path / "out.jsonl", run) as store:
        store.add([prediction(4)])
        run_task(backend, samples, store, max_new_tokens=4, batch_size=2)
        run_task(backend, samples, store, max_new_tokens=4, batch_size=2)  # nothing is left
    assert backend.batches == [["a" * 9, "a" * 5], ["a" * 3, "a"]]
    _, predictions = read_predictions(tmp_path / "out.jsonl")
    assert [(p.row, p.answer) for p in predictions if p.row != 4] == [(n, texts[n - 1]) for n in (1, 2, 3, 5)]


def test_bigger_pictures_come_before_longer_texts(tmp_path):
    samples = []
    for n, (side, text) in enumerate([(32, "long" * 9), (64, "short"), (64, "longer")], 1):
        path = tmp_path / f"{n}.png"
        Image.new("RGB", (side, side)).save(path)
        content = [{"type": "image", "image": str(path)}, {"type": "text", "text": text}]
        samples.append(Sample(n, [{"role": "user", "content": content}], text, text, (path.name,)))
    backend = Recorder()
    with Store(tmp_path / "out.jsonl", RUN) as store:
        run_task(backend, samples, store, max_new_tokens=4, batch_size=1)
    assert [batch[0][1]["text"] for batch in backend.batches] == ["longer", "short", "long" * 9]


SLOW_RUN = """
import sys, time
from pathlib import Path
from qwen_vl_serve import Reply
from qwenvl_eval import Run, Sample, Store, run_task

class Slow:
    def generate(self, batch, sampling):
        time.sleep(0.05)
        return [Reply(m[0]["content"], "stop", 5, 1) for m in batch]

samples = [Sample(n, [{"role": "user", "content": str(n)}], str(n), str(n), ()) for n in range(1, 61)]
with Store(Path(sys.argv[1]), Run("m", "w", "a", "s", 60, 8)) as store:
    print("already", len(store.done))
    run_task(Slow(), samples, store, max_new_tokens=8, batch_size=3)
"""


def test_a_run_killed_midway_keeps_its_predictions_and_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", SLOW_RUN, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 10:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = path.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    count = kept.count(b"\n") - 1
    assert 9 <= count < 60
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert f"already {count}" in again.stdout
    assert path.read_bytes().startswith(kept)
    run, predictions = read_predictions(path)
    assert [p.answer for p in predictions] == [str(n) for n in range(1, 61)]
    assert summarise(run, predictions).accuracy.right == 60
    assert json.loads(kept.splitlines()[0])["run"]["samples"] == 60
