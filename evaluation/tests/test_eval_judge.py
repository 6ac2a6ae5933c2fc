"""The judge model, played by a small HTTP server that answers as an OpenAI endpoint does, or fails to."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_serve import BackendError
from qwenvl_eval import Prediction, Run, Store
from qwenvl_eval.cli import main
from qwenvl_eval.judge import HOPELESS, Case, open_judge, prompt_of, read_ruling
from qwenvl_eval.scoring import Outcome, Verdict

OPTIONS = {"A": "red car", "B": "blue car", "C": "none {of} them"}


def choice(answer, gold="B", question="Which car is near?"):
    return Case(question, answer, {"type": "multiple-choice", "answer": gold, "options": OPTIONS})


def free(answer, *golds):
    return Case("How far is it?", answer, {"type": "open", "answer": list(golds) if golds[1:] else golds[0]})


class Endpoint(ThreadingHTTPServer):
    """Replies what ``say`` makes of a prompt: words, or a status to fail with."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say = lambda prompt: "B"
        self.prompts, self.keys, self.models, self.paths = [], set(), set(), set()
        self.guard, self.at_once, self.most_at_once = threading.Lock(), 0, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = request["messages"]
        with self.server.guard:
            self.server.prompts.append(message["content"])
            self.server.keys.add(self.headers["Authorization"])
            self.server.models.add(request["model"])
            self.server.paths.add(self.path)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        assert request["temperature"] == 0
        words = self.server.say(message["content"])
        with self.server.guard:
            self.server.at_once -= 1
        status, body = 200, b"<html>no JSON</html>"
        if isinstance(words, int):
            status, body = words, json.dumps({"error": {"message": "scripted"}}).encode()
        elif words is not None:
            reply = {"index": 0, "message": {"role": "assistant", "content": words}, "finish_reason": "stop"}
            whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "j", "choices": [reply]}
            body = json.dumps(whole).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def rule(endpoint, cache, cases, name="wise", **options):
    options = {"base_url": endpoint.url, "api_key": "k", "retries": 0} | options
    with open_judge(name, cache, **options) as judge:
        return judge.rule(cases)


def lines(cache):
    return [json.loads(line) for line in cache.read_text(encoding="utf-8").splitlines()]


def answered(prompt):
    return prompt.rpartition("<reply>\n")[2].partition("\n</reply>")[0]


def test_the_judge_decides_what_an_answer_means(endpoint, tmp_path):
    replies = {
        "the azure one": "B",
        "the crimson one": "**A**",
        "both": "UNCLEAR",
        "hm": "I would rather not say",
        "about 3 m": "SAME",
        "5 m": "Verdict: DIFFERENT",
        "3 or 5 m": "",
    }
    endpoint.say = lambda prompt: replies[answered(prompt)]
    cases = [choice(answer) for answer in list(replies)[:4]] + [
        free(answer, "3", "3 m") for answer in list(replies)[4:]
    ]
    rulings = rule(endpoint, tmp_path / "judge.jsonl", [*cases, choice(" \n")])
    assert rulings.verdicts == [
        Verdict(Outcome.RIGHT, "B"),
        Verdict(Outcome.WRONG, "A"),
        Verdict(Outcome.UNPARSED),
        Verdict(Outcome.UNPARSED, chance=0.25),
        Verdict(Outcome.RIGHT, "same"),
        Verdict(Outcome.WRONG, "different"),
        Verdict(Outcome.UNPARSED),
        Verdict(Outcome.UNPARSED),  # empty: not asked about
    ]
    assert (rulings.asked, rulings.failed, rulings.unreadable) == (7, 0, 2)
    assert endpoint.keys == {"Bearer k"} and endpoint.models == {"wise"}
    record = next(r for r in lines(tmp_path / "judge.jsonl") if r["words"] == "**A**")
    assert (record["judge"], record["ruling"]) == ("wise", "A")
    assert record["prompt"] == prompt_of(cases[1])


def test_a_prompt_holds_what_the_judge_needs_and_no_gold_letter():
    prompt = prompt_of(choice("the {azure} one", question="Which {car}?"))
    for part in ("Which {car}?", "A. red car\nB. blue car\nC. none {of} them", "the {azure} one"):
        assert part in prompt
    assert prompt == prompt_of(choice("the {azure} one", gold="A", question="Which {car}?"))
    assert "3\n3 m" in prompt_of(free("x", "3", "3 m"))


def test_a_second_run_asks_only_what_is_missing(endpoint, tmp_path):
    cache = tmp_path / "deep" / "judge.jsonl"
    cases = [choice(f"car {number}") for number in range(20)]
    first = rule(endpoint, cache, cases[:12])
    assert (first.asked, len(endpoint.prompts)) == (12, 12)
    second = rule(endpoint, cache, cases + cases[:5])
    assert (second.asked, len(endpoint.prompts)) == (8, 20)
    assert second.verdicts == [Verdict(Outcome.RIGHT, "B")] * 25
    assert max(Counter(endpoint.prompts).values()) == 1
    assert len(lines(cache)) == 20
    other = rule(endpoint, cache, cases, name="wiser")
    assert other.asked == 20
    assert rule(endpoint, cache, cases).asked == 0
    gold_moved = rule(endpoint, cache, [choice("car 1", gold="A")])
    assert (gold_moved.asked, gold_moved.verdicts) == (0, [Verdict(Outcome.WRONG, "B")])


def test_failures_stay_unparsed_and_are_asked_again(endpoint, tmp_path):
    cache = tmp_path / "judge.jsonl"
    fail = {"one": 500, "two": 429, "three": None, "four": 400}
    endpoint.say = lambda prompt: fail.get(answered(prompt), "B")
    cases = [choice(answer) for answer in ["zero", *fail]]
    rulings = rule(endpoint, cache, cases)
    assert rulings.verdicts == [
        Verdict(Outcome.RIGHT, "B"),
        *[Verdict(Outcome.UNPARSED, chance=0.25)] * 4,
    ]
    assert (rulings.asked, rulings.failed, rulings.unreadable) == (5, 4, 0)
    assert len(lines(cache)) == 1
    fail.clear()
    again = rule(endpoint, cache, cases)
    assert (again.asked, again.failed) == (4, 0)
    assert all(verdict.right for verdict in again.verdicts)


def test_a_judge_that_is_not_there_is_an_error(endpoint, tmp_path):
    endpoint.say = lambda prompt: 503
    cases = [choice(f"car {number}") for number in range(3 * HOPELESS)]
    with pytest.raises(BackendError, match=f"wise replied to none of {HOPELESS}.*503"):
        rule(endpoint, tmp_path / "judge.jsonl", cases)
    assert len(endpoint.prompts) < 2 * HOPELESS + 32
    few = rule(endpoint, tmp_path / "judge.jsonl", cases[:3])
    assert (few.failed, {v.outcome for v in few.verdicts}) == (3, {Outcome.UNPARSED})


def test_an_unreadable_reply_is_kept_and_not_asked_again(endpoint, tmp_path):
    cache = tmp_path / "judge.jsonl"
    endpoint.say = lambda prompt: "A or B 或 \ud800"
    for asked in (1, 0):
        rulings = rule(endpoint, cache, [choice("hm")])
        assert (rulings.asked, rulings.unreadable, rulings.failed) == (asked, 1, 0)
        assert rulings.verdicts == [Verdict(Outcome.UNPARSED, chance=0.25)]
    assert [(r["words"], r["ruling"]) for r in lines(cache)] == [("A or B 或 \ud800", "")]


def test_a_half_written_last_line_is_dropped_and_other_damage_named(endpoint, tmp_path):
    cache = tmp_path / "judge.jsonl"
    cases = [choice("one"), choice("two")]
    rule(endpoint, cache, cases)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-7])
    rulings = rule(endpoint, cache, cases)
    assert rulings.asked == 1 and all(verdict.right for verdict in rulings.verdicts)
    assert sorted(r["key"] for r in lines(cache)) == sorted(json.loads(x)["key"] for x in whole.splitlines())
    for damage in (b"{}\n", b'"x"\n', b"\n", b'{"key": \xff}\n'):
        cache.write_bytes(whole.splitlines(keepends=True)[0] + damage + whole)
        with pytest.raises(ValueError, match=r"judge\.jsonl, line 2: no ruling"):
            rule(endpoint, cache, cases)


def test_requests_run_side_by_side_but_not_without_bound(endpoint, tmp_path):
    gate = threading.Barrier(4)

    def say(prompt):
        gate.wait(timeout=20)
        return "B"

    endpoint.say = say
    cases = [choice(f"car {number}") for number in range(16)]
    with open_judge("wise", tmp_path / "c", base_url=endpoint.url, concurrency=4) as judge:
        assert judge.rule(cases).failed == 0
    assert endpoint.most_at_once == 4


@pytest.mark.parametrize(
    ("api_type", "key", "address"),
    [
        ("dash", "CHATGPT_DASHSCOPE_API_KEY", "DASHSCOPE_API_BASE"),
        ("mit", "MIT_SPIDER_TOKEN", "MIT_SPIDER_URL"),
    ],
)
def test_credentials_come_from_the_variables_of_the_original(
    endpoint, tmp_path, monkeypatch, api_type, key, address
):
    for name in (key, address):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"{key}, which is not set"):
        open_judge("wise", tmp_path / "c", api_type=api_type)
    monkeypatch.setenv(key, "secret")
    with pytest.raises(ValueError, match=f"{address}, which is not set"):
        open_judge("wise", tmp_path / "c", api_type=api_type)
    for number, url in enumerate((endpoint.url, f"{endpoint.url}/", f"{endpoint.url}/chat/completions")):
        monkeypatch.setenv(address, url)
        with open_judge("wise", tmp_path / "c", api_type=api_type) as judge:
            assert judge.rule([choice(f"car {number}")]).verdicts[0].right
    assert endpoint.keys == {"Bearer secret"} and endpoint.paths == {"/v1/chat/completions"}
    assert "secret" not in (tmp_path / "c").read_text(encoding="utf-8")


def test_an_address_or_a_known_kind_of_credentials_is_needed(tmp_path):
    for options in ({}, {"base_url": "http://127.0.0.1:9/v1", "api_type": "mit"}):
        with pytest.raises(ValueError, match="give either base_url or api_type"):
            open_judge("wise", tmp_path / "c", **options)
    with pytest.raises(ValueError, match="api_type is 'gpt'; there are dash and mit"):
        open_judge("wise", tmp_path / "c", api_type="gpt")


@pytest.mark.parametrize(
    ("words", "ruling"),
    [
        ("B", "B"),
        (" b.", "B"),
        ("The answer is B.", "B"),
        ("B. blue car", "B"),
        ("blue car", "B"),
        ("UNCLEAR", "UNCLEAR"),
        ("Answer: Unclear.", "UNCLEAR"),
        ("It is UNCLEAR whether B", ""),
        ("A or B", ""),
        ("D", ""),
        ("<think>A? The answer is A.\nUNCLEAR</think>\n\nC", "C"),
        ("", ""),
    ],
)
def test_reading_a_ruling_on_options(words, ruling):
    assert read_ruling(choice("x"), words) == ruling


@pytest.mark.parametrize(
    ("words", "ruling"),
    [
        ("SAME", "SAME"),
        ("**different**", "DIFFERENT"),
        ("They agree.\n\nFinal answer: SAME", "SAME"),
        ("Not the SAME", ""),
        ("SAME\nDIFFERENT", ""),
        ("<think>DIFFERENT\n</think>SAME", "SAME"),
        ("SAMELY", ""),
        ("", ""),
    ],
)
def test_reading_a_ruling_on_an_open_answer(words, ruling):
    assert read_ruling(free("x", "3"), words) == ruling


@given(st.text(max_size=60), st.booleans())
def test_garbage_is_read_as_a_ruling_or_as_none(words, is_open):
    case = free("x", "3") if is_open else choice("x")
    allowed = {"SAME", "DIFFERENT", ""} if is_open else {*OPTIONS, "UNCLEAR", ""}
    assert read_ruling(case, words) in allowed


def test_score_takes_a_judge_for_what_the_rule_leaves_open(endpoint, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.jsonl"
    answers = ["The answer is B.", "the azure one", "no idea"]
    run = Run("realworldqa", {}, "m", "w", "d", "s", len(answers), {})
    with Store(path, run) as store:
        for index, answer in enumerate(answers):
            content = [{"type": "image", "image": {}}, {"type": "text", "text": f"Which car, {index}?"}]
            prompt = [{"role": "user", "content": content}]
            store.add([Prediction(
                id=str(index), index=index, replicate=0, key=f"{index:064x}"[::-1], prompt=prompt, media=[],
                answer=answer, reasoning="", finish_reason="stop", error="", prompt_tokens=1,
                completion_tokens=1, seconds=1.0, target=choice("").target, cluster=str(index), groups={},
            )])  # fmt: skip
    endpoint.say = lambda prompt: "B" if answered(prompt) == "the azure one" else "UNCLEAR"
    monkeypatch.setenv("MIT_SPIDER_URL", f"{endpoint.url}/chat/completions")
    monkeypatch.setenv("MIT_SPIDER_TOKEN", "k")
    command = ["score", str(path), "--eval-model", "wise", "--api-type", "mit", "--nproc", "2"]
    for _ in range(2):  # the second time from the cache
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "66.7 %" in out and "(rule + wise; 95 % interval)" in out and "2 right, 1 unparsed" in out
    assert len(endpoint.prompts) == 2 and all("Which car, " in prompt for prompt in endpoint.prompts)
    assert main([*command, "--protocol", "all", "--output-file", str(tmp_path / "scores.json")]) == 0
    protocols = json.loads((tmp_path / "scores.json").read_text())["protocols"]
    assert [*protocols] == ["letter", "rule", "strict", "rule + wise"]
    assert main(["score", str(path), "--judge-url", endpoint.url]) == 1
    assert "name it with --eval-model" in capsys.readouterr().err
