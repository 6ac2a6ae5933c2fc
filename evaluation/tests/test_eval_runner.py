"""The runner against a real server that fails, stalls, talks nonsense, and against kill -9."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from qwen_vl_serve import BackendError, Reply, RequestRefused, Sampling
from qwenvl_eval import Dataset, Predictions, Run, Sample, Store, infer
from qwenvl_eval.cli import main
from qwenvl_eval.media import hash_media
from qwenvl_eval.provenance import describe_run, weights_hash
from qwenvl_eval.runner import HOPELESS, question_key
from qwenvl_eval.tasks.conversations import Conversations

RUN = Run("conversations", {}, "m", "w", "d", "s", 5, {})
GREEDY = Sampling(temperature=0, max_new_tokens=4)


class Recorder:
    """A back end that remembers its batches and answers with the question."""

    concurrent = False

    def __init__(self, broken=()):
        self.batches, self.samplings, self.broken = [], [], dict(broken)

    def generate(self, batch, sampling):
        texts = [str(messages[-1]["content"]) for messages in batch]
        self.batches.append(texts)
        self.samplings.append(sampling)
        for text in texts:
            if text in self.broken:
                raise self.broken[text]
        return [Reply(text, "stop", 5, 2) for text in texts]


class Wide(Recorder):
    concurrent = True


def dataset(contents):
    samples = [
        Sample(f"q{n}", [{"role": "user", "content": c}], {"answer": str(c)}, str(n))
        for n, c in enumerate(contents)
    ]
    return Dataset((), len(samples), lambda: iter(samples))


def ask(path, backend, data, sampling=GREEDY, **options):
    with Store(path, Run("t", {}, "m", "w", "d", "s", len(data), {})) as store:
        return infer(backend, data, store, sampling, **options)


def test_only_missing_questions_are_asked_longest_first(tmp_path):
    texts = ["a" * n for n in (3, 9, 1, 7, 5)]
    backend = Recorder()
    ask(tmp_path / "out.jsonl", backend, dataset(texts[:2]), batch_size=2)
    assert backend.batches == [["a" * 9, "a" * 3]]
    with Store(tmp_path / "two.jsonl", RUN) as store:
        infer(Recorder(), dataset(texts[:1]), store, GREEDY)
        infer(backend, dataset(texts), store, GREEDY, batch_size=2)
        infer(backend, dataset(texts), store, GREEDY, batch_size=2)  # nothing is left
    assert backend.batches[1:] == [["a" * 9, "a" * 7], ["a" * 5, "a"]]
    assert [p.answer for p in Predictions(tmp_path / "two.jsonl")] == texts


@pytest.mark.parametrize("kind", [Recorder, Wide])
def test_a_question_that_stands_twice_in_the_data_is_two_questions(tmp_path, kind):
    path, backend = tmp_path / "out.jsonl", kind()
    for _ in range(2):
        ask(path, backend, dataset("aaab"), batch_size=1, concurrency=1)
        assert [(p.index, p.answer) for p in Predictions(path)] == [*enumerate("aaab")]
    assert len(backend.batches) == 4


def test_bigger_pictures_come_before_longer_texts(tmp_path):
    contents = []
    for n, (side, text) in enumerate([(32, "long" * 9), (64, "short"), (64, "longer")]):
        Image.new("RGB", (side, side)).save(tmp_path / f"{n}.png")
        content = [{"type": "image", "image": str(tmp_path / f"{n}.png")}, {"type": "text", "text": text}]
        contents.append(content)
    backend = Recorder()
    ask(tmp_path / "out.jsonl", backend, dataset(contents), batch_size=1)
    assert [eval_text(batch[0]) for batch in backend.batches] == ["longer", "short", "long" * 9]


def eval_text(content):
    return content.split("'text': '")[1].split("'")[0]


@pytest.mark.parametrize("kind", [Recorder, Wide])
def test_one_bad_sample_stops_nothing_and_is_kept_with_its_reason(tmp_path, kind):
    backend = kind(
        {"b": BackendError("no route"), "c": RequestRefused("too long"), "d": ValueError("no such")}
    )
    outcome = ask(tmp_path / "out.jsonl", backend, dataset("abcde"))
    found = {p.answer or p.error: p.finish_reason for p in Predictions(tmp_path / "out.jsonl")}
    assert found == {
        "a": "stop",
        "no route": "failed",
        "too long": "refused",
        "no such": "refused",
        "e": "stop",
    }
    assert (outcome.answered, outcome.failed) == (4, 1)
    backend.broken.clear()
    backend.batches.clear()
    assert ask(tmp_path / "out.jsonl", backend, dataset("abcde")).failed == 0
    assert backend.batches == [["b"]]  # refused ones are not asked again


def test_nothing_but_failures_ends_the_run(tmp_path):
    backend = Wide(dict.fromkeys(map(str, range(1000)), BackendError("connection refused")))
    with pytest.raises(BackendError, match=r"none was answered; the last one: connection refused"):
        ask(tmp_path / "out.jsonl", backend, dataset(map(str, range(1000))), concurrency=4)
    assert HOPELESS <= len(backend.batches) < HOPELESS + 20


@pytest.mark.parametrize("kind", [Recorder, Wide])
def test_an_error_of_our_own_is_raised_and_what_was_answered_is_kept(tmp_path, kind):
    with pytest.raises(KeyError, match="bug"):
        ask(
            tmp_path / "out.jsonl",
            kind({"e": KeyError("bug")}),
            dataset("abcde"),
            batch_size=1,
            concurrency=1,
        )
    assert len(Predictions(tmp_path / "out.jsonl")) == 4


def test_replicates_have_seeds_of_their_own_and_never_share_a_batch(tmp_path):
    backend = Recorder()
    sampling = Sampling(temperature=1, seed=7)
    path = tmp_path / "out.jsonl"
    with Store(path, Run("t", {}, "m", "w", "d", "s", 2, {}, replicates=3)) as store:
        infer(backend, dataset("ab"), store, sampling, replicates=3)
    asked = zip(backend.samplings, backend.batches, strict=True)
    assert sorted((s.seed, tuple(sorted(batch))) for s, batch in asked) == [
        (7, ("a", "b")), (8, ("a", "b")), (9, ("a", "b")),
    ]  # fmt: skip
    assert [(p.index, p.replicate) for p in Predictions(path)] == [(i, r) for i in range(2) for r in range(3)]


def test_the_key_knows_media_prompt_sampling_and_replicate(tmp_path):
    def messages(colour, text, name="a.png"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
        return [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / name)},
                                             {"type": "text", "text": text}]}]  # fmt: skip

    def key(asked, sampling=GREEDY, replicate=0, before=0):
        return question_key(hash_media(asked), sampling, replicate, before)

    first = key(messages("red", "what?"))
    assert first == key(messages("red", "what?", "elsewhere.png"))
    others = [
        key(messages("blue", "what?")), key(messages("red", "who?")),
        key(messages("red", "what?"), Sampling(temperature=1)), key(messages("red", "what?"), GREEDY, 1),
        key(messages("red", "what?"), before=1),
    ]  # fmt: skip
    assert len({first, *others}) == 6


def test_the_same_weights_elsewhere_are_the_same_run_and_changed_ones_are_not(tmp_path):
    questions = tmp_path / "test.jsonl"
    questions.write_text("{}\n")
    data = Dataset((questions,), 1, lambda: iter(()))

    def describe(model):
        return describe_run("conversations", Conversations(), questions, data, model, GREEDY)

    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))
    here, there = map(str, folders)
    assert describe(here).difference(describe(there)) == []
    (folders[1] / "model.safetensors").write_bytes(bytes(500) + b"\1" + bytes(499))
    assert "weights" in describe(here).difference(describe(there))[0]
    (folders[1] / "model.safetensors").write_bytes(bytes(1000))
    (folders[1] / "chat_template.jinja").write_text("another prompt")
    assert "weights" in describe(here).difference(describe(there))[0]
    assert weights_hash("Qwen/one") != weights_hash("Qwen/two")
    (tmp_path / "adapter").mkdir()
    adapters = [weights_hash("Qwen/one")]
    for rank in (8, 16):
        (tmp_path / "adapter/adapter_config.json").write_text(f'{{"r": {rank}}}')
        (tmp_path / "adapter/adapter_model.safetensors").write_bytes(bytes(rank))
        adapters.append(weights_hash("Qwen/one", adapter=tmp_path / "adapter"))
    assert len(set(adapters)) == 3
    assert describe(here).revision and "torch" in describe(here).versions


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers with the question, after ``behave`` had its say."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.tell(
            200,
            {"object": "list", "data": [{"id": "stub", "object": "model", "created": 0, "owned_by": "x"}]},
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (text,) = (item["text"] for item in body["messages"][-1]["content"] if item["type"] == "text")
        with self.server.lock:
            self.server.asked[text] += 1
            number = self.server.asked.total()
        if (told := self.server.behave(text, number)) is not None:
            return self.tell(*told)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        with self.server.lock:
            self.server.answered[text] += 1
        self.tell(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "stub",
                        "choices": [choice], "usage": usage})  # fmt: skip

    def tell(self, status, body):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def endpoint(behave=lambda text, number: None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.behave, server.lock, server.asked, server.answered = behave, threading.Lock(), Counter(), Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    rows = []
    for number in range(60):
        turns = [{"from": "human", "value": f"<image>q{number}"}, {"from": "gpt", "value": f"q{number}"}]
        rows.append({"image": "a.png", "conversations": turns})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json"


def words(url, questions, output, *more):
    flags = ["--model-path", url, "--data-dir", str(questions), "--output-file", str(output)]
    return ["infer", "conversations", *flags, "--concurrency", "4", *more]


def answers(path):
    return [(p.index, p.key, p.answer, p.finish_reason) for p in Predictions(path)]


def test_killed_at_three_random_moments_it_asks_nothing_twice_and_loses_nothing(questions, tmp_path):
    chance = random.Random(5)

    def slow(text, number):
        time.sleep(0.05 + 0.05 * chance.random())

    path = tmp_path / "out.jsonl"
    with endpoint(slow) as (server, url):
        command = [sys.executable, "-m", "qwenvl_eval.cli", *words(url, questions, path)]
        for moment in range(3):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            until = chance.randrange(12 * moment + 3, 12 * moment + 15)
            deadline = time.monotonic() + 60
            while not path.exists() or path.read_bytes().count(b"\n") <= until:
                assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        done = path.read_bytes().count(b"\n") - 1
        assert done < 60
        asked_before = server.asked.copy()
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        assert (server.asked - asked_before).total() == 60 - done  # those on disk are not asked again
        lines = path.read_text().splitlines()[1:]
        assert Counter(json.loads(line)["id"] for line in lines) == Counter(map(str, range(60)))
        whole = tmp_path / "whole.jsonl"
        assert main(words(url, questions, whole)) == 0
    assert answers(path) == answers(whole)
    scores = []
    for file in (path, whole):
        assert main(["score", str(file), "--output-file", str(tmp_path / "scores.json")]) == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text())["protocols"])
    assert scores[0] == scores[1] and scores[0]["exact"]["accuracy"]["right"] == 60


def test_failures_stalls_and_nonsense_end_counted_and_a_rerun_asks_only_those(questions, tmp_path, capsys):
    stalled = threading.Event()
    nonsense = [b"<html>", b"[]", b'{"choices": []}', b'{"object": "chat.completion"}', b"\xff\xfe"]

    def hostile(text, number):
        place = int(text[1:])
        if place % 5 == 0:
            return 500, {"error": {"message": "scripted"}}
        if place == 7:
            stalled.wait(30)
        if place % 10 == 3:
            return 200, nonsense[place // 10 % len(nonsense)]
        if place == 9:
            return 400, {"error": {"message": "longer than the model takes"}}
        return None

    path = tmp_path / "out.jsonl"
    with endpoint(hostile) as (server, url):
        flags = ["--timeout", "2", "--retries", "0"]
        assert main(words(url, questions, path, *flags)) == 1
        assert "19 questions failed; the same command asks them again" in capsys.readouterr().err
        found = Counter(p.finish_reason for p in Predictions(path))
        assert found == {"stop": 40, "failed": 19, "refused": 1}
        assert main(["score", str(path)]) == 0
        out = capsys.readouterr().out
        assert "40 right, 1 refused, 19 failed" in out and "66.7 %" in out  # the denominator stays
        stalled.set()
        server.behave = lambda text, number: None
        server.asked.clear()
        assert main(words(url, questions, path, *flags)) == 0
        expected = {f"q{n}" for n in range(60) if n % 5 == 0 or n == 7 or n % 10 == 3}
        assert dict(server.asked) == dict.fromkeys(expected, 1)
    assert Counter(p.finish_reason for p in Predictions(path)) == {"stop": 59, "refused": 1}


def test_a_server_that_fails_every_fifth_request_is_asked_again_until_all_is_answered(questions, tmp_path):
    def flaky(text, number):
        return (503, {"error": {"message": "busy"}}) if number % 5 == 0 else None

    with endpoint(flaky) as (server, url):
        assert main(words(url, questions, tmp_path / "out.jsonl")) == 0
        assert server.asked.total() > 60 and all(count == 1 for count in server.answered.values())
    assert [a[2] for a in answers(tmp_path / "out.jsonl")] == [f"q{n}" for n in range(60)]
