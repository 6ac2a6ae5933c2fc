"""MathVision: what a row of MathVision.tsv becomes, and what is told of a bad one."""

import json
from pathlib import Path

import pytest

from qwenvl_eval.samples import picture, write_sample, write_tsv
from qwenvl_eval.samples.mathvision import COLUMNS
from qwenvl_eval.scoring import Outcome
from qwenvl_eval.tasks.mathvision import BOXED, COT, Mathvision

RECORDS = Path(__file__).resolve().parents[3] / "shared" / "eval-records"
DOT = picture(("circle", "red", 64, 64))
LETTERS = str(["A", "B", "C", "D", "E"])


def row(index="1", **cells):
    return {
        "index": index, "question": "How many?\n<image1>", "choices": "[]", "answer": "60",
        "category": "counting", "level": "2", "image": DOT,
    } | cells  # fmt: skip


def samples(folder, *rows, columns=COLUMNS, **options):
    folder = folder / str(len(list(folder.iterdir())))
    rows = [{name: cell for name, cell in row.items() if name in columns} for row in rows]
    write_tsv(folder / "MathVision.tsv", columns, rows)
    return list(Mathvision(**options).open(folder))


def texts(sample):
    return [item["text"] if item["type"] == "text" else None for item in sample.messages[0]["content"]]


def test_a_value_and_a_choice(tmp_path):
    value, choice = samples(tmp_path, row(), row("2", choices=str([r"$\frac{1}{2}$", "it's"]), answer="B"))
    assert value.target == {"type": "open", "answer": "60", "options": [], "level": 2}
    assert value.groups == {"subject": "counting", "level": "2"}
    assert texts(value) == ["Question: How many?\n", None, f"\n{BOXED}"]
    assert choice.target == {"type": "open", "answer": "B", "options": [r"$\frac{1}{2}$", "it's"], "level": 2}
    assert texts(choice)[-1] == "\nOptions:\nA. $\\frac{1}{2}$\nB. it's\n" + BOXED
    assert all(name in value.groups for table in Mathvision.tables for name in table)


def test_options_stand_in_the_prompt_once(tmp_path):
    listed = row(question="<image1> Which?\n(A) red (B) blue", choices="['red', 'blue']", answer="A")
    unlisted = row("2", question="<image1> (A) or (B)?", choices="['red', 'blue']", answer="A")
    own, ours = samples(tmp_path, listed, unlisted)
    assert texts(own)[-1] == f" Which?\n(A) red (B) blue\n{BOXED}"
    assert "Options:\nA. red\nB. blue\n" in texts(ours)[-1]
    assert own.target["options"] == ours.target["options"] == ["red", "blue"]


def test_options_may_stand_in_columns_and_the_level_may_be_missing(tmp_path):
    columns = [*(name for name in COLUMNS if name not in ("choices", "level")), "A", "B", "C"]
    (sample,) = samples(tmp_path, row(A="one", B="two", C="nan", answer="B"), columns=columns)
    assert sample.target == {"type": "open", "answer": "B", "options": ["one", "two"], "level": None}
    assert sample.groups == {"subject": "counting"}


def test_a_mention_of_a_part_of_the_picture_stays_as_text(tmp_path):
    choices = str([f"<image{n}>" for n in range(2, 7)])
    (sample,) = samples(tmp_path, row(choices=choices, answer="C"))
    assert texts(sample)[1] is None
    assert "A. <image2>\nB. <image3>" in texts(sample)[2]


def test_questions_about_one_picture_are_one_cluster(tmp_path):
    other = picture(("square", "red", 64, 64))
    first, second, third = samples(tmp_path, row(), row("2", answer="3"), row("3", image=other))
    assert first.cluster == second.cluster != third.cluster


def test_the_first_questions_only(tmp_path):
    write_sample("mathvision", tmp_path)
    assert [sample.id for sample in Mathvision(num_samples=3).open(tmp_path)] == ["1", "2", "3"]
    assert len(Mathvision().open(tmp_path)) == len(Mathvision(num_samples=99).open(tmp_path)) == 10
    with pytest.raises(ValueError, match="num_samples is -1; give"):
        Mathvision(num_samples=-1)
    with pytest.raises(ValueError, match=r"MathVision_MINI\.tsv: no such file; download"):
        Mathvision(dataset="MathVision_MINI").open(tmp_path)


def test_chain_of_thought_and_pixel_limits(tmp_path):
    (ours,) = samples(tmp_path, row(), use_cot=True, min_pixels=1024)
    (own,) = samples(tmp_path, row(), use_cot=True, cot_prompt="Think!")
    assert (texts(ours)[-1], texts(own)[-1]) == (f"\n{COT}", "\nThink!")
    assert ours.messages[0]["content"][1]["min_pixels"] == 1024
    assert set(own.messages[0]["content"][1]) == {"type", "image"}
    with pytest.raises(ValueError, match="cot_prompt is given but use_cot is not"):
        Mathvision(cot_prompt="Think!")


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"choices": "[1, 2]"}, r"row 2, column 'choices': no list of texts: '\[1, 2\]'"),
        ({"choices": "__import__('os')"}, r"row 2, column 'choices': no list of texts"),
        ({"choices": LETTERS, "answer": "F"}, r"row 2, column 'answer': 'F' is the letter of none of the 5"),
        (
            {"choices": LETTERS, "answer": "AB"},
            r"row 2, column 'answer': 'AB' is the letter of none of the 5",
        ),
        ({"level": "6"}, r"row 2, column 'level': is '6'; it must be 1 to 5"),
        ({"level": "12"}, r"row 2, column 'level': is '12'; it must be 1 to 5"),
        ({"category": ""}, r"row 2, column 'category': is empty"),
        ({"image": "99"}, r"row 2, column 'image': '99' is neither base64"),
    ],
)
def test_a_bad_row_is_named(tmp_path, cells, told):
    with pytest.raises(ValueError, match=rf"MathVision\.tsv: {told}"):
        samples(tmp_path, row(), row("2") | cells)


def test_the_right_answer_is_right_by_every_protocol_and_a_wrong_one_by_none(tmp_path):
    write_sample("mathvision", tmp_path)
    for sample in Mathvision().open(tmp_path):
        gold = sample.target["answer"]
        wrong = "E" if sample.target["options"] else "77777"
        for protocol in Mathvision.protocols.values():
            assert protocol(rf"Thus \boxed{{{gold}}}", sample.target).outcome is Outcome.RIGHT
            assert not protocol(rf"Thus \boxed{{{wrong}}}", sample.target).right


@pytest.mark.skipif(not RECORDS.is_dir(), reason=f"no recorded problems at {RECORDS}")
def test_all_published_problems_can_be_read(tmp_path):
    with (RECORDS / "mathvision-test.jsonl").open(encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    rows = [
        row(
            p["id"],
            question=p["question"],
            choices=str(p["options"]),
            answer=p["answer"],
            level=str(p["level"]),
        )
        | {"category": p["subject"], "image": "1" if p["id"] != "1" else DOT}
        for p in problems
    ]
    found = samples(tmp_path, *rows)
    assert len(found) == 3040
    for problem, sample in zip(problems, found, strict=True):
        published = {name: problem[name] for name in ("answer", "options", "level")}
        assert sample.target == {"type": "open", **published}
        assert sample.groups == {"subject": problem["subject"], "level": str(problem["level"])}
        assert sum(text is None for text in texts(sample)) == 1
    assert len({sample.groups["subject"] for sample in found}) == 16
