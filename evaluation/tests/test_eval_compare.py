"""`qwenvl-eval compare` on predictions made here."""

import itertools
import json
import random
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest

from qwen_vl_serve import Sampling
from qwenvl_eval.cli import main
from qwenvl_eval.provenance import describe_run
from qwenvl_eval.store import Prediction, Store
from qwenvl_eval.task import task_class

TASK = """
from dataclasses import dataclass
from qwenvl_eval.scoring import Outcome, Verdict
from qwenvl_eval.scoring.text import exact
from qwenvl_eval.tasks.conversations import Conversations

def contains(answer, target):
    return Verdict(Outcome.RIGHT if target["answer"] in answer else Outcome.WRONG, answer)

@dataclass(frozen=True)
class Yes(Conversations):
    title = "Yes"
    protocols = {"exact": exact, "contains": contains}
"""


def make_data(folder: Path, count: int, clusters: int) -> Path:
    """Questions whose answer is "yes"; question i is about video i modulo ``clusters``."""
    (folder / "yes.py").write_text(TASK)
    rows = []
    for number in range(count):
        (folder / f"{number % clusters}.mp4").touch()
        turns = [{"from": "human", "value": f"<video>{number}?"}, {"from": "gpt", "value": "yes"}]
        group = "first half" if number < count // 2 else "second half"
        rows.append({"video": f"{number % clusters}.mp4", "id": f"q{number}", "group": group})
        rows[-1]["conversations"] = turns
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def write(data: Path, name: str, answers, *, model="a-model", replicates=1, options=None) -> Path:
    """``answers[index * replicates + replicate]``: a text, or True for "yes" and False for "no"."""
    source = str(data.parent / "yes.py")
    task = task_class(source)(**(options or {}))
    dataset = task.open(data)
    samples = list(dataset)
    run = describe_run(source, task, data, dataset, model, Sampling(temperature=0), replicates=replicates)
    path = data.parent / name
    with Store(path, run) as store:
        for number, answer in enumerate(answers):
            index, replicate = divmod(number, replicates)
            text = answer if isinstance(answer, str) else "yes" if answer else "no"
            store.add([prediction(samples[index], index, replicate, text)])
    return path


def prediction(sample, index, replicate, answer):
    return Prediction(
        id=sample.id, index=index, replicate=replicate, key=f"{index * 100 + replicate:064x}", prompt=[],
        media=[], answer=answer, reasoning="", finish_reason="stop", error="", prompt_tokens=1,
        completion_tokens=1, seconds=0.1, target=sample.target, cluster=sample.cluster, groups=sample.groups,
    )  # fmt: skip


def compared(first: Path, second: Path, *more: str) -> dict:
    output = first.parent / "found.json"
    assert main(["compare", str(first), str(second), "--output-file", str(output), *more]) == 0
    return json.loads(output.read_text())


def exact_mcnemar(only_first: int, only_second: int) -> float:
    total = only_first + only_second
    extreme = [k for k in range(total + 1) if abs(2 * k - total) >= abs(only_first - only_second)]
    return float(sum(Fraction(comb(total, k), 2**total) for k in extreme))


def brute_force_p(differences: list[int]) -> float:
    """Of all ways to swap the runs in clusters with these differences, the share as extreme as this."""
    ways = [sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((-1, 1), repeat=len(differences))]  # fmt: skip
    return sum(abs(way) >= abs(sum(differences)) for way in ways) / len(ways)


def test_two_runs_are_told_apart_by_every_figure(tmp_path, capsys):
    data = make_data(tmp_path, 20, clusters=20)
    first = write(data, "a.jsonl", [n % 2 == 0 for n in range(20)])
    second = write(data, "b.jsonl", [n != 0 for n in range(20)], model="better")
    found = compared(first, second)
    paired = found["paired"]
    assert (found["first"]["value"], found["second"]["value"]) == (0.5, 0.95)
    assert [paired[k] for k in ("both", "only_first", "only_second", "neither")] == [9, 1, 10, 0]
    assert paired["difference"] == pytest.approx(0.45)
    assert 0 < paired["low"] < 0.45 < paired["high"] < 1
    p = exact_mcnemar(1, 10)
    assert paired["mcnemar"] == pytest.approx(p) and paired["sign_flip"] == pytest.approx(p)
    assert [f["id"] for f in found["flips"]] == ["q0", *(f"q{n}" for n in range(1, 20, 2))]
    assert (found["flips"][0]["first"]["outcome"], found["flips"][0]["second"]["outcome"]) == (
        "right",
        "wrong",
    )
    halves = found["by_group"]
    assert found["group"] == "group" and set(halves) == {"first half", "second half"}
    assert halves["first half"]["paired"]["difference"] == pytest.approx(0.4)
    assert halves["second half"]["second"]["value"] == 1.0
    told = capsys.readouterr().out
    for part in (
        "50.0 % [", "95.0 % [", "by better", "+45.0 points [", f"p = {p:.3g}", "the second is better",
        "1 answers of the first alone, 10 of the second alone, 9 of both, 0 of neither",
        f"to see 2 points with 80 % you need about {found['questions_needed']['questions']:,} questions",
    ):  # fmt: skip
        assert part in told, part
    row = next(line for line in told.splitlines() if line.startswith("second half"))
    assert row.split()[2:7] == ["10", "50.0", "%", "100.0", "%"]


@pytest.mark.parametrize("seed", range(8))
def test_questions_about_one_video_are_taken_as_a_whole(tmp_path, seed):
    draw = random.Random(seed)
    data = make_data(tmp_path, 24, clusters=6)
    a, b = ([draw.random() < share for _ in range(24)] for share in (0.4, 0.7))
    paired = compared(write(data, "a.jsonl", a), write(data, "b.jsonl", b))["paired"]
    sums = [sum(b[n] - a[n] for n in range(cluster, 24, 6)) for cluster in range(6)]
    assert paired["clusters"] == 6
    assert paired["sign_flip"] == pytest.approx(brute_force_p(sums))


def test_swapping_the_runs_swaps_the_signs(tmp_path):
    draw = random.Random(3)
    data = make_data(tmp_path, 30, clusters=10)
    one, other = (
        write(data, name, [draw.random() < share for _ in range(30)])
        for name, share in (("a.jsonl", 0.5), ("b.jsonl", 0.8))
    )
    forth, back = compared(one, other), compared(other, one)
    assert forth["paired"]["difference"] == -back["paired"]["difference"] != 0
    assert forth["paired"]["low"] == pytest.approx(-back["paired"]["high"])
    assert forth["paired"]["sign_flip"] == pytest.approx(back["paired"]["sign_flip"])
    assert forth["first"] == back["second"]
    assert forth["questions_needed"] == back["questions_needed"]


def test_a_run_against_itself(tmp_path, capsys):
    data = make_data(tmp_path, 10, clusters=10)
    path = write(data, "a.jsonl", [n < 6 for n in range(10)])
    found = compared(path, path)
    assert found["paired"]["difference"] == 0 and found["paired"]["sign_flip"] == 1
    assert found["flips"] == []
    assert "no evidence that either is better" in capsys.readouterr().out


def test_replicates_count_as_their_average(tmp_path, capsys):
    data = make_data(tmp_path, 80, clusters=80)
    once = compared(
        write(data, "a.jsonl", [n < 20 for n in range(80)]),
        write(data, "b.jsonl", [n % 4 < 3 for n in range(80)]),
    )
    capsys.readouterr()
    same = compared(
        write(data, "a3.jsonl", [n // 3 < 20 for n in range(240)], replicates=3),
        write(data, "b3.jsonl", [n // 3 % 4 < 3 for n in range(240)], replicates=3),
    )
    told = capsys.readouterr().out
    # Answers that never change say no more than one of them.
    assert same["paired"]["difference"] == once["paired"]["difference"] == 0.5
    assert same["paired"]["sign_flip"] == pytest.approx(once["paired"]["sign_flip"])
    for end in ("low", "high"):
        assert same["paired"][end] == pytest.approx(once["paired"][end], abs=0.005)
    needed = (found["questions_needed"]["questions"] for found in (once, same))
    assert next(needed) == pytest.approx(next(needed), rel=0.02)
    assert "80 questions about 80 pictures or videos, 3 times each" in told
    assert "replicates of a question are not independent" in told


def test_a_protocol_can_be_chosen(tmp_path, capsys):
    data = make_data(tmp_path, 4, clusters=4)
    first = write(data, "a.jsonl", ["oh yes, that", "yes", "no", "no"])
    second = write(data, "b.jsonl", ["yes", "yes", "no", "well yes then"])
    assert compared(first, second)["paired"]["only_second"] == 1
    found = compared(first, second, "--protocol", "contains")
    assert found["protocol"] == "contains"
    assert [f["id"] for f in found["flips"]] == ["q3"]
    capsys.readouterr()
    for wrong in ("nobody", "all"):
        assert main(["compare", str(first), str(second), "--protocol", wrong]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"has no protocol {wrong!r}; it has exact, contains" in line


def test_what_differs_is_named(tmp_path, capsys):
    data = make_data(tmp_path, 6, clusters=6)
    first = write(data, "a.jsonl", [True] * 6)
    other = tmp_path / "other"
    other.mkdir()
    cases = [
        (write(data, "b.jsonl", [True] * 6, options={"min_pixels": 4096}), "option min_pixels 0 and 4096;"),
        (write(data, "c.jsonl", [True] * 12, replicates=2), "replicates 1 and 2;"),
        (write(make_data(other, 5, 5), "d.jsonl", [True] * 5), "samples 6 and 5;"),
    ]
    for second, told in cases:
        assert main(["compare", str(first), str(second)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "did not ask the same questions" in line and told in line, line
        assert ("data_sha256" in line) == ("samples" in told)
    changed = tmp_path / "e.jsonl"
    changed.write_text(first.read_text().replace('"id": "q3"', '"id": "q33"'))
    assert main(["compare", str(first), str(changed)]) == 1
    assert "sample q33 replicate 0 stands where the other file has q3" in capsys.readouterr().err


def test_other_models_samplings_and_places_may_differ(tmp_path):
    data = make_data(tmp_path, 6, clusters=6)
    first = write(data, "a.jsonl", [True] * 6)
    second = tmp_path / "b.jsonl"
    lines = first.read_text().splitlines(keepends=True)
    run = json.loads(lines[0])
    run["run"] |= {"weights": "f" * 64, "sampling": {"temperature": 0.7}, "data": "/moved", "engine": "vllm"}
    second.write_text(json.dumps(run) + "\n" + "".join(lines[1:]))
    assert compared(first, second)["paired"]["both"] == 6


def test_errors_are_one_line_and_nothing_is_overwritten(tmp_path, capsys):
    data = make_data(tmp_path, 4, clusters=4)
    first = write(data, "a.jsonl", [True] * 4)
    partial = tmp_path / "partial.jsonl"
    partial.write_text("".join(first.read_text().splitlines(keepends=True)[:-1]))
    before = first.read_bytes()
    cases = [
        ([str(first), str(partial)], "partial.jsonl: 3 of 4 predictions"),
        ([str(first), str(tmp_path / "nowhere.jsonl")], "No such file"),
        ([str(first), str(first), "--output-file", str(first)], "--output-file would overwrite it"),
    ]
    for arguments, told in cases:
        assert main(["compare", *arguments]) == 1
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("qwenvl-eval: ") and told in line and captured.out == ""
    assert first.read_bytes() == before


def test_the_order_of_the_lines_does_not_matter(tmp_path):
    data = make_data(tmp_path, 12, clusters=4)
    draw = random.Random(0)
    first = write(data, "a.jsonl", [draw.random() < 0.5 for _ in range(12)])
    second = write(data, "b.jsonl", [draw.random() < 0.5 for _ in range(12)])
    found = compared(first, second)
    head, *rest = second.read_text().splitlines(keepends=True)
    draw.shuffle(rest)
    second.write_text(head + "".join(rest))
    assert compared(first, second) == found


@pytest.mark.parametrize("command", ["compare", "report"])
def test_help_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    expected = {"compare": ["which of two runs", "--protocol", "--output-file", "A.jsonl"],
                "report": ["P.json, P.md and P.html", "--data-dir", "--samples"]}  # fmt: skip
    assert all(part in told for part in expected[command])
