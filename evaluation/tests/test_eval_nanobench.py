"""nanobench: its metrics, its baselines worked out by hand, and the command on a tiny set."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwenvl_eval.cli import main
from qwenvl_eval.scoring import Verdict
from qwenvl_eval.scoring.blind import best_constant
from qwenvl_eval.scoring.intervals import mean_interval, wilson
from qwenvl_eval.scoring.skills import METRICS, graded
from qwenvl_eval.scoring.verdict import Outcome
from qwenvl_eval.task import Judged
from qwenvl_eval.tasks.nanobench import Nanobench

MODEL = Path(__file__).resolve().parents[2] / "models/qwen3-vl-nano"
BOX = [100, 100, 300, 300]
CALL = '<tool_call>\n{"name": "mobile_use", "arguments": {"action": "click", "coordinate": [200, 200]}}\n</tool_call>'  # noqa: E501
ZOOM = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [90, 90, 310, 310]}}</tool_call>'
SOLID = '{"bbox_3d": [0, 0.5, 4, 1, 1, 1, 0, 0, 0], "label": "red box"}'
PAGE = '<html><body>\n<h1 data-bbox="0 0 100 50">A title</h1>\n<p data-bbox="0 60 100 90">words</p>\n</body></html>'  # noqa: E501
SVG = '<svg><rect x="1" y="2" width="30" height="40" fill="red"/><circle cx="60" cy="60" r="9" fill="blue"/></svg>'  # noqa: E501


@pytest.mark.parametrize(
    ("metric", "answer", "more", "score"),
    [
        ("exact", "A cat.", {"answer": "a cat"}, 1),
        ("edit", "abcx", {"answer": "abcd"}, 0.75),
        ("box", '{"bbox_2d": [100, 100, 300, 200], "label": "x"}', {"boxes": [BOX]}, 1),
        ("box", '{"bbox_2d": [100, 100, 300, 199], "label": "x"}', {"boxes": [BOX]}, 0),
        ("box", "[100, 100, 300, 300]", {"boxes": [BOX]}, 0),
        ("boxes", json.dumps([{"bbox_2d": BOX}, {"bbox_2d": BOX}]), {"boxes": [BOX]}, 2 / 3),
        ("point", '{"point_2d": [100, 300]}', {"box": BOX}, 1),
        ("point", '{"point_2d": [99, 300]}', {"box": BOX}, 0),
        ("click", CALL.replace("200, 200", "101, 299"), {"answer": CALL, "box": BOX}, 1),
        ("click", CALL.replace("200, 200", "99, 299"), {"answer": CALL, "box": BOX}, 0),
        ("click", CALL.replace("mobile", "computer"), {"answer": CALL, "box": BOX}, 0),
        ("click", CALL.replace('"click"', '"swipe"'), {"answer": CALL, "box": BOX}, 0),
        ("zoom", ZOOM, {"answer": ZOOM, "box": BOX, "most": 0.06}, 1),
        ("zoom", ZOOM.replace("90, 90", "0, 0"), {"answer": ZOOM, "box": BOX, "most": 0.06}, 0),
        ("zoom", ZOOM.replace("310", "290"), {"answer": ZOOM, "box": BOX, "most": 0.06}, 0),
        ("fields", '{"a": "1", "b": "3"}', {"answer": '{"a": "1", "b": "2"}'}, 0.5),
        ("fields", '```json\n{"a": "1"}\n```', {"answer": '{"a": "1", "b": "2"}'}, 2 / 3),
        ("span", '{"start": 1, "end": 3}', {"span": [1, 2]}, 1),
        ("span", '{"start": 1, "end": 3.1}', {"span": [1, 2]}, 0),
        ("span", '{"start": 3, "end": 1}', {"span": [1, 3]}, 0),
        ("cuboid", SOLID.replace("4,", "4.9,"), {"answer": SOLID, "cuboid": [0, 0.5, 4, 1, 1, 1, 0, 0, 0]}, 1),  # noqa: E501
        ("cuboid", SOLID.replace("4,", "5.1,"), {"answer": SOLID, "cuboid": [0, 0.5, 4, 1, 1, 1, 0, 0, 0]}, 0),  # noqa: E501
        ("cuboid", SOLID.replace("red", "blue"), {"answer": SOLID, "cuboid": [0, 0.5, 4, 1, 1, 1, 0, 0, 0]}, 0),  # noqa: E501
        ("document", PAGE.replace("words", "nothing"), {"answer": PAGE}, 0.5),
        ("document", PAGE.replace("0 60 100 90", "0 0 100 10"), {"answer": PAGE}, 0.5),
        ("drawing", SVG.replace("blue", "green"), {"answer": SVG}, 0.5),
        ("drawing", SVG, {"answer": SVG}, 1),
    ],
)  # fmt: skip
def test_scores_worked_out_by_hand(metric, answer, more, score):
    assert METRICS[metric](answer, {"answer": "", **more}) == pytest.approx(score)


@given(st.text(max_size=60) | st.sampled_from([
    "[[[[", '{"bbox_2d": [1e999, 0, 1, 1]}', '{"bbox_2d": ["1", 2, 3, 4]}', "<tool_call>{}</tool_call>", "NaN",  # noqa: E501
    '{"start": null, "end": []}', '<tool_call>{"name": 1, "arguments": []}</tool_call>', "[" * 3000,
    '<svg><polygon points="1" fill="red"/></svg>', '<p data-bbox="1 2 3">x</p>', '{"bbox_2d": [true, 1, 2, 3]}',  # noqa: E501
]))  # fmt: skip
def test_no_answer_breaks_a_metric_or_leaves_zero_to_one(answer):
    target = {"boxes": [BOX], "box": BOX, "span": [0, 1], "cuboid": [0, 0, 4, 1, 1, 1, 0, 0, 0], "most": 0.1}
    golds = {
        "click": CALL,
        "zoom": ZOOM,
        "fields": '{"a": "1"}',
        "cuboid": SOLID,
        "document": PAGE,
        "drawing": SVG,
    }
    for name, metric in METRICS.items():
        assert 0 <= metric(answer, {"answer": golds.get(name, "x"), **target}) <= 1


def test_an_empty_answer_is_unparsed_and_a_graded_one_keeps_its_score():
    assert graded(" ", {"metric": "exact", "answer": "x"}).outcome is Outcome.UNPARSED
    half = graded('{"a": "1", "b": "3"}', {"metric": "fields", "answer": '{"a": "1", "b": "2"}'})
    assert (half.outcome, half.score) == (Outcome.WRONG, 0.5)


def test_the_constant_answer_is_the_most_frequent_or_the_one_in_the_middle():
    answers = [{"answer": answer} for answer in ("no", "yes", "no", "a", "yes", "b", "yes")]
    assert best_constant(answers, METRICS["exact"]) == "yes"
    assert best_constant(answers[:4] + answers[4:5], METRICS["exact"]) == "no"  # as frequent: alphabetical
    boxes = [[0, 0, 100, 100], [0, 0, 100, 160], [0, 0, 100, 250]]
    targets = [{"answer": json.dumps({"bbox_2d": box}), "boxes": [box]} for box in boxes]
    assert best_constant(targets, METRICS["box"]) == targets[1]["answer"]
    with pytest.raises(ValueError, match="no training targets"):
        best_constant([], METRICS["exact"])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_an_interval_holds_the_mean_and_stays_within_zero_and_one(scores):
    low, high = mean_interval(scores, resamples=300)
    assert -1e-9 <= low <= high <= 1 + 1e-9
    assert mean_interval([0, 1, 1, 0], resamples=1) == wilson(0.5, 4)


def judged(skill, look, score, constant="x", answer="x"):
    target = {"metric": "exact", "answer": answer, "constant": constant}
    verdict = Verdict(Outcome.RIGHT if score == 1 else Outcome.WRONG, score=score)
    return Judged(f"{skill}{look}", 0, target, skill, {"skill": skill, "look": look}, False, verdict)


def test_the_table_is_the_means_and_claims_twenty_points_above_both():
    seen = [
        judged("a", "picture", score, "x", gold) for score, gold in ((1, "x"), (1, "y"), (1, "z"), (0, "w"))
    ]
    blind = [judged("a", "blind", score) for score in (1, 0, 0, 0)]
    close = [judged("b", "picture", 1), judged("b", "blind", 0)]  # the constant answer is right too
    table = Nanobench().notes([*seen, *blind, *close])
    low, high = wilson(0.75, 4)
    assert table[2] == f"| a | 4 | 75.0 % [{100 * low:.1f}, {100 * high:.1f}] | 25.0 % | 25.0 % | yes |"
    assert table[3].endswith("| 0.0 % | 100.0 % | no |") and math.isclose(low, 0.3006, abs_tol=1e-3)
    assert len(Nanobench().headline([*seen, *blind])) == 4


def write_set(folder, **wrong):
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    Image.new("RGB", (64, 64), "gray").save(folder / "grey.png")
    turns = [{"from": "human", "value": "<image>Which colour?"}, {"from": "gpt", "value": "red"}]
    row = {"id": "colour/0", "skill": "colour", "metric": "exact", "target": {"answer": "red"}, "constant": "red",  # noqa: E501
           "conversations": turns, "image": ["a.png"], "grey": ["grey.png"]} | wrong  # fmt: skip
    (folder / "colour.jsonl").write_text(json.dumps(row) + "\n")


def test_the_command_asks_twice_and_prints_the_table(tmp_path, capsys):
    write_set(tmp_path)
    answers = tmp_path / "out" / "answers.jsonl"
    answers.parent.mkdir()
    words = ["--model-path", str(MODEL), "--data-dir", str(tmp_path), "--output-file", str(answers)]
    assert main(["run", "nanobench", *words, "--engine", "transformers", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "| colour | 1 | " in printed and "| 100.0 % | no |" in printed
    assert "| colour | 1 | " in answers.with_suffix(".md").read_text()
    first, second = (json.loads(line) for line in answers.read_text().splitlines()[1:])
    assert {first["id"], second["id"]} == {"colour/0/picture", "colour/0/blind"}
    assert first["prompt"] != second["prompt"]  # the hash of the picture
    assert first["prompt_tokens"] == second["prompt_tokens"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"metric": "luck"}, "'luck'"), ({"image": ["b.png"]}, "no such file"), ({"grey": ["b.png"]}, "no such file")],  # noqa: E501
)  # fmt: skip
def test_a_row_that_cannot_be_asked_is_named(tmp_path, wrong, said):
    write_set(tmp_path, **wrong)
    with pytest.raises(ValueError, match=said) as error:
        Nanobench().open(tmp_path)
    assert "colour.jsonl: line 1" in str(error.value)


def test_an_empty_folder_says_how_to_write_it(tmp_path):
    with pytest.raises(ValueError, match=r"qwenvl\.nano\.bench"):
        Nanobench().open(tmp_path)
