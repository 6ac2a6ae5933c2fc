"""Each benchmark from its files to its report, offline: models/qwen3-vl-nano through transformers and through
the real vLLM server, by ``qwenvl-eval`` and by ``run_*.py``."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_vl_serve.launch import running_server
from qwenvl_eval import Prediction, Predictions
from qwenvl_eval.cli import main
from qwenvl_eval.commands import infer
from qwenvl_eval.samples import write_sample
from qwenvl_eval.task import task_class
from qwenvl_eval.tasks import mathvision, mmmu

EVALUATION = Path(__file__).resolve().parents[1]
NANO = EVALUATION.parent / "models/qwen3-vl-nano"
# Each video at once has a decoder process, here and in the server; more of them than cores only take turns.
SHORT = "--temperature 0 --max-new-tokens 8 --concurrency 2".split()


@dataclass(frozen=True)
class Benchmark:
    """``questions`` in its sample about ``clusters`` pictures or videos; ``limits`` keep its media small."""

    task: str
    script: str
    questions: int
    clusters: int
    limits: tuple[str, ...] = ()


BENCHMARKS = {
    benchmark.task: benchmark
    for benchmark in (
        Benchmark("mmmu", "mmmu/run_mmmu.py", 10, 10),
        Benchmark("mathvision", "MathVision/run_mathv.py", 10, 4),
        Benchmark("realworldqa", "RealWorldQA/run_realworldqa.py", 8, 3),
        Benchmark(
            "videomme", "VideoMME/run_videomme.py", 6, 3, ("--min-pixels", "4096", "--max-pixels", "16384")
        ),
        Benchmark(
            "odinw", "ODinW-13/run_odinw.py", 26, 26, ("--min-pixels", "4096", "--max-pixels", "16384")
        ),
    )
}


@pytest.fixture(scope="module")
def starting():
    """The server's address to come; meanwhile there is something else to do."""
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        yield pool.submit(stack.enter_context, running_server(NANO))


@pytest.fixture(scope="module")
def served(starting) -> str:
    return starting.result()


@pytest.fixture(scope="module", params=BENCHMARKS)
def benchmark(request) -> Benchmark:
    return BENCHMARKS[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For all of a module's data and predictions."""
    return tmp_path_factory.mktemp("end_to_end")


def data_of(task: str, folder: Path) -> str:
    return str(write_sample(task, folder / task))


def words(benchmark: Benchmark, folder: Path, model: str, output: Path, *more: str) -> list[str]:
    """The flags of infer, after the task's name."""
    flags = ["--model-path", model, "--data-dir", data_of(benchmark.task, folder)]
    return [*flags, "--output-file", str(output), *SHORT, *benchmark.limits, *more]


@dataclass(frozen=True)
class Answered:
    """The command lines of both engines, and what they wrote."""

    commands: tuple[list[str], list[str]]
    here: Predictions
    there: Predictions


@pytest.fixture(scope="module")
def answered(benchmark, folder, starting: Future[str]) -> Answered:
    outputs = [folder / f"{benchmark.task}_{engine}.jsonl" for engine in ("transformers", "server")]
    local = words(benchmark, folder, str(NANO), outputs[0], "--engine", "transformers", "--device", "cpu")
    assert main(["infer", benchmark.task, *local]) == 0
    remote = words(benchmark, folder, starting.result(), outputs[1], "--processor", str(NANO))
    assert main(["infer", benchmark.task, *remote]) == 0
    commands = ["infer", benchmark.task, *local], ["infer", benchmark.task, *remote]
    return Answered(commands, *map(Predictions, outputs))


def test_both_engines_are_asked_the_same_and_answer_the_same(answered, benchmark):
    here, there = list(answered.here), list(answered.there)
    for run, found in ((answered.here.run, here), (answered.there.run, there)):
        assert run.samples == len(found) == len({p.id for p in found}) == benchmark.questions
        assert len({p.cluster for p in found}) == benchmark.clusters
        assert all(p.finish_reason in ("stop", "length") and not p.error for p in found)
        # The model may end its turn at once; nothing else that it said is lost.
        assert all(p.answer or (p.finish_reason, p.completion_tokens) == ("stop", 1) for p in found)
        assert sum(not p.answer for p in found) <= 1
        assert max(p.completion_tokens for p in found) <= 8
    for mine, other in zip(here, there, strict=True):
        for name in ("id", "key", "prompt", "media", "target", "cluster", "groups"):
            assert getattr(mine, name) == getattr(other, name)
        for name in ("answer", "finish_reason", "prompt_tokens", "completion_tokens"):
            assert getattr(mine, name) == getattr(other, name), mine.id
    assert len({p.answer for p in here}) > 1  # it looks at what it is asked
    assert answered.here.run.data_sha256 == answered.there.run.data_sha256
    assert (answered.here.run.engine, answered.there.run.engine) == ("transformers", "openai")


def test_what_the_model_saw_is_kept(answered, benchmark):
    for p in answered.here:
        items = [item for message in p.prompt for item in message["content"] if item["type"] != "text"]
        assert len(items) == len(p.media) >= 1
        for item, seen in zip(items, p.media, strict=True):
            assert len(item[item["type"]]["sha256"]) == 64
            assert seen["height"] % 32 == seen["width"] % 32 == 0 < seen["height"] * seen["width"]
            video = item["type"] == "video"
            assert video == ("frames" in seen) == (benchmark.task == "videomme")
            if video:
                assert len(seen["frames"]) == len(seen["seconds"]) >= 4
                assert seen["frames"] == sorted(set(seen["frames"]))
    lines = answered.here.path.read_text().splitlines()
    assert all("base64" not in line and len(line) < 5000 for line in lines[1:])


def test_the_same_commands_again_ask_nothing(answered, monkeypatch):
    def nothing(*_: object, **__: object) -> None:
        pytest.fail("a question was asked again")

    monkeypatch.setattr(infer, "infer", nothing)
    for command, kept in zip(answered.commands, (answered.here, answered.there), strict=True):
        before = kept.path.read_bytes()
        assert main(command) == 0
        assert kept.path.read_bytes() == before


def test_every_protocol_scores_and_the_report_shows_every_sample(answered, benchmark, tmp_path, capsys):
    kind = task_class(benchmark.task)
    path, scores = answered.there.path, tmp_path / "scores.json"
    assert main(["score", str(path), "--protocol", "all", "--output-file", str(scores)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(scores.read_text())
    assert list(found["protocols"]) == list(kind.protocols)
    for name, summary in found["protocols"].items():
        assert name in printed
        assert sum(summary["outcomes"].values()) == summary["accuracy"]["total"] == benchmark.questions
    headline = found["protocols"][next(iter(kind.protocols))]
    assert len(headline["tables"]) == len(kind.tables)
    assert main(["report", str(path)]) == 0
    done = capsys.readouterr()
    written = [path.with_suffix(suffix) for suffix in (".json", ".md", ".html")]
    assert done.out.split() == list(map(str, written)) and not done.err  # pictures are there
    assert json.loads(written[0].read_text())["protocols"] == found["protocols"]
    assert kind.title in written[1].read_text()
    page = written[2].read_text()
    assert all(f'<span class="id">{p.id}</span>' in page for p in answered.there)


def script(benchmark: Benchmark, mode: str, *flags: str, cwd: Path, **variables: str) -> str:
    """What ``run_*.py`` prints."""
    command = [sys.executable, str(EVALUATION / benchmark.script), mode, *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_does_the_same(answered, benchmark, folder, served, tmp_path):
    """One of the five loads the model; the others ask the server."""
    output, report = tmp_path / "out.jsonl", tmp_path / "out.json"
    local = benchmark.task == "mmmu"
    engine = ["--engine", "transformers", "--device", "cpu"] if local else []
    flags = words(benchmark, folder, str(NANO) if local else served, output, *engine)
    script(benchmark, "infer", *flags, cwd=tmp_path)
    again = [(p.key, p.answer, p.finish_reason) for p in Predictions(output)]
    assert again == [(p.key, p.answer, p.finish_reason) for p in answered.here]
    files = ["--input-file", "out.jsonl", "--output-file", "out.json"]
    printed = script(benchmark, "eval", *files, "--data-dir", data_of(benchmark.task, folder), cwd=tmp_path)
    found = json.loads(report.read_text())
    assert list(found["protocols"]) == list(task_class(benchmark.task).protocols)
    assert main(["score", str(answered.here.path), "--protocol", "all", "--output-file", str(report)]) == 0
    assert json.loads(report.read_text())["protocols"] == found["protocols"]
    assert f"{benchmark.questions} about {benchmark.clusters} pictures or videos" in printed


def test_a_judge_model_is_asked_once_by_the_script(folder, asked, served, tmp_path):
    asked("realworldqa")
    answers = folder / "realworldqa_server.jsonl"
    flags = ["--input-file", str(answers), "--output-file", str(tmp_path / "out.json"), "--nproc", "2"]
    flags += ["--eval-model", "qwen3-vl-nano", "--api-type", "dash"]
    variables = {"CHATGPT_DASHSCOPE_API_KEY": "none", "DASHSCOPE_API_BASE": served}
    script(BENCHMARKS["realworldqa"], "eval", *flags, cwd=tmp_path, **variables)
    found = json.loads((tmp_path / "out.json").read_text())["protocols"]
    assert list(found) == [*task_class("realworldqa").protocols, "rule + qwen3-vl-nano"]
    rulings = answers.with_suffix(".judge.jsonl").read_bytes()
    assert len(rulings.splitlines()) >= 1  # the small model's answers are few letters, and its rulings fewer
    gone = variables | {"DASHSCOPE_API_BASE": "http://127.0.0.1:9/v1"}
    script(BENCHMARKS["realworldqa"], "eval", *flags, cwd=tmp_path, **gone)
    assert json.loads((tmp_path / "out.json").read_text())["protocols"] == found
    assert answers.with_suffix(".judge.jsonl").read_bytes() == rulings


# ---- what the options do to the questions


@pytest.fixture
def asked(folder, served):
    """(task, flags) -> the predictions of a run with them, by the server; without flags those of above."""

    def ask(task: str, *flags: str) -> list[Prediction]:
        output = folder / f"{task}_{len(list(folder.iterdir())) if flags else 'server'}.jsonl"
        assert main(["infer", task, *words(BENCHMARKS[task], folder, served, output, *flags)]) == 0
        return list(Predictions(output))

    return ask


def last_text(prediction: Prediction) -> str:
    return prediction.prompt[-1]["content"][-1]["text"]


def test_a_chain_of_thought_is_asked_for_in_the_given_words(asked):
    for task, cot in (("mmmu", mmmu.COT), ("mathvision", mathvision.COT)):
        plain = asked(task)
        for flags, instruction in ((), cot), (("--cot-prompt", "Think aloud."), "Think aloud."):
            thinking = asked(task, "--use-cot", *flags)
            assert [p.id for p in thinking] == [p.id for p in plain]
            assert not {p.key for p in thinking} & {p.key for p in plain}
            assert all(last_text(p).endswith(instruction) for p in thinking)
            assert not any(last_text(p).endswith(instruction) for p in plain)


def test_fewer_questions_are_the_first_ones_with_the_same_keys(asked):
    for task, flag in (("mathvision", "--num-samples"), ("videomme", "--max-samples")):
        keys = [p.key for p in asked(task)]
        assert [p.key for p in asked(task, flag, "3")] == keys[:3]


def test_the_options_of_videos_reach_the_question(asked, tmp_path_factory):
    every = asked("videomme")
    (plain,) = asked("videomme", "--duration", "medium", "--max-samples", "1")
    assert [p.groups["duration"] for p in asked("videomme", "--duration", "medium")] == ["medium"] * 2
    assert plain.key in {p.key for p in every}
    assert "subtitle" not in last_text(plain) and [m["role"] for m in plain.prompt] == ["user"]
    system = tmp_path_factory.mktemp("prompt") / "system.txt"
    system.write_text("You watch closely.")
    limits = {"fps": 4.0, "min_frames": 2, "max_frames": 6, "min_pixels": 1024, "max_pixels": 4096}
    limits["total_pixels"] = 65536
    flags = [word for name, value in limits.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--duration", "medium", "--max-samples", "1", "--use-subtitle", "--sys-prompt", str(system)]
    (other,) = asked("videomme", *flags)
    first, user = other.prompt
    assert first == {"role": "system", "content": "You watch closely."}
    video, text = user["content"]
    assert {name: video[name] for name in limits} == limits
    assert "Now the square is green. Now the square is red." in text["text"]
    assert text["text"].endswith(last_text(plain))
