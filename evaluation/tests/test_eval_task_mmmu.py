"""MMMU: what a row of MMMU_DEV_VAL.tsv becomes, what is told of a bad one, and the official's own figures."""

import json
from pathlib import Path

import pytest

from qwenvl_eval.samples import picture, write_sample, write_tsv
from qwenvl_eval.samples.mmmu import COLUMNS
from qwenvl_eval.scoring import Outcome, Verdict, mmmu
from qwenvl_eval.task import Judged, task_class
from qwenvl_eval.tasks.mmmu import COT, DISCIPLINE_OF, DISCIPLINES, LETTER, SHORT, Mmmu

RECORDS = Path(__file__).resolve().parents[3] / "shared" / "eval-records"
DOT = picture(("circle", "red", 64, 64))


def row(id="validation_Art_1", **cells):
    return {
        "id": id, "index": id, "question": "<image 1> Which?", "split": id.partition("_")[0], "A": "red",
        "B": "blue", "answer": "A", "question_type": "multiple-choice", "image": str([DOT]),
    } | cells  # fmt: skip


def samples(folder, *rows, **options):
    folder = folder / str(len(list(folder.iterdir())))
    write_tsv(folder / "MMMU_DEV_VAL.tsv", [*COLUMNS, "hint"], rows)
    return list(Mmmu(**options).open(folder))


def texts(sample):
    return [item["text"] if item["type"] == "text" else None for item in sample.messages[0]["content"]]


def images(sample):
    return [item for item in sample.messages[0]["content"] if item["type"] == "image"]


def test_dev_and_validation_are_never_mixed(tmp_path):
    path = write_sample("mmmu", tmp_path)
    validation, dev = Mmmu().open(tmp_path), Mmmu(split="dev").open(path)
    assert (len(validation), len(dev)) == (10, 2)
    assert all(sample.id.startswith("validation_") for sample in validation)
    assert [sample.id for sample in dev] == ["dev_Art_1", "dev_Math_1"]
    with pytest.raises(ValueError, match=r"no questions of the split 'test'; give one of dev, validation"):
        Mmmu(split="test").open(tmp_path)


def test_the_sample_is_the_same_bytes_every_time_and_replaces_nothing(tmp_path):
    content = write_sample("mmmu", tmp_path / "a").read_bytes()
    assert write_sample("mmmu", tmp_path / "b").read_bytes() == content
    assert write_sample("mmmu", tmp_path / "b").read_bytes() == content
    (tmp_path / "b" / "MMMU_DEV_VAL.tsv").write_bytes(b"the real one")
    with pytest.raises(ValueError, match=r"MMMU_DEV_VAL\.tsv is there already and is not this sample"):
        write_sample("mmmu", tmp_path / "b")
    assert (tmp_path / "b" / "MMMU_DEV_VAL.tsv").read_bytes() == b"the real one"
    with pytest.raises(ValueError, match=r"no sample of 'nothing'; there is one of mathvision, mmmu"):
        write_sample("nothing", tmp_path)


def test_pictures_stand_where_they_are_mentioned(tmp_path):
    write_sample("mmmu", tmp_path)
    by_id = {sample.id: sample for sample in Mmmu().open(tmp_path)}
    assert texts(by_id["validation_Art_1"]) == [
        "Question: ",
        None,
        " The circle has which colour?\nOptions:\nA. red\nB. blue\nC. green\nD. yellow\n" + LETTER,
    ]
    assert texts(by_id["validation_Art_Theory_1"]) == [
        "Question: Which picture shows a square?\nOptions:\nA. ",
        *(None, "\nB. ", None, "\nC. ", None),
        f"\n{LETTER}",
    ]
    assert texts(by_id["validation_Public_Health_1"])[0] is None  # never mentioned: first
    kinds = [item["image"].partition(";")[0] for item in images(by_id["validation_Art_Theory_1"])]
    assert kinds == ["data:image/png", "data:image/jpeg", "data:image/png"]
    assert 'Value\n"Circle"\t$6' in texts(by_id["validation_Accounting_1"])[0]


def test_pixel_limits_stand_on_the_pictures_only_when_given(tmp_path):
    plain, *_ = samples(tmp_path, row())
    limited, *_ = samples(tmp_path, row(), max_pixels=4096)
    both, *_ = samples(tmp_path, row(), min_pixels=1024, max_pixels=4096)
    assert [set(images(sample)[0]) - {"type", "image"} for sample in (plain, limited, both)] == [
        set(),
        {"max_pixels"},
        {"min_pixels", "max_pixels"},
    ]


def test_an_open_question_never_becomes_one_with_options(tmp_path):
    rows = [
        row("validation_Math_1", A="", B="nan", question_type="open", answer="['a half', '0.5']"),
        row("validation_Math_2", A="nan", B="", question_type="", answer="[1, 2]"),
        row("validation_Math_4", A="", B="", question_type="short-answer", answer="7"),
        row("validation_Math_3", question_type=""),
    ]
    listed, single, short, choice = samples(tmp_path, *rows)
    assert listed.target == {"type": "open", "answer": ["a half", "0.5"], "options": {}}
    assert single.target == {"type": "open", "answer": "[1, 2]", "options": {}}
    assert short.target == {"type": "open", "answer": "7", "options": {}}
    assert choice.target["type"] == "multiple-choice"
    assert texts(listed)[-1] == f" Which?\n{SHORT}"
    for protocol in Mmmu.protocols.values():
        assert protocol("0.5", listed.target).right
        assert not protocol("A", listed.target).right


def test_groups_are_the_paper_s(tmp_path):
    sample, other = samples(
        tmp_path, row("validation_Basic_Medical_Science_30"), row("validation_Art_Theory_1")
    )
    assert sample.groups == {"subject": "Basic_Medical_Science", "discipline": "Health & Medicine"}
    assert (sample.cluster, sample.id) == ("validation_Basic_Medical_Science_30",) * 2
    assert other.groups["subject"] == "Art_Theory"
    assert (len(DISCIPLINE_OF), len(DISCIPLINES)) == (30, 6)
    assert all(name in sample.groups for table in Mmmu.tables for name in table)


def test_a_hint_comes_first(tmp_path):
    (sample,) = samples(tmp_path, row(hint="Look."))
    assert texts(sample)[0] == "Hint: Look.\nQuestion: "


def test_chain_of_thought_takes_the_instruction_s_place(tmp_path):
    (ours,) = samples(tmp_path, row(), use_cot=True)
    (own,) = samples(tmp_path, row(), use_cot=True, cot_prompt="Think!")
    assert texts(ours)[-1].endswith(f"\nB. blue\n{COT}")
    assert texts(own)[-1].endswith("\nB. blue\nThink!")
    with pytest.raises(ValueError, match="cot_prompt is given but use_cot is not"):
        Mmmu(cot_prompt="Think!")


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"answer": "C"}, r"row 2, column 'answer': 'C' is none of the options A, B"),
        ({"A": "", "B": ""}, r"row 2, column 'answer': 'A' is none of the options \(none\)"),
        ({"question_type": "open"}, r"row 2, column 'A': an open question with options"),
        ({"question_type": "essay"}, r"row 2, column 'question_type': is 'essay'; it must be"),
        ({"question": "<image 2>?"}, r"row 2, column 'image': 1 pictures, but <image 2> is mentioned"),
        (
            {"id": "validation_Astrology_1"},
            r"row 2, column 'id': 'validation_Astrology_1' names none of the 30",
        ),
        ({"id": "validation_Art_1"}, r"two rows have the id 'validation_Art_1'"),
        ({"image": "[]"}, r"row 2, column 'image': the list of pictures is empty"),
        ({"split": ""}, r"row 2, column 'split': is empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, cells, told):
    with pytest.raises(ValueError, match=rf"MMMU_DEV_VAL\.tsv: {told}"):
        samples(tmp_path, row(), row("validation_Art_2") | cells)


def test_the_right_answer_is_right_by_every_protocol_and_a_wrong_one_by_none(tmp_path):
    write_sample("mmmu", tmp_path)
    kind = task_class("mmmu")
    for sample in kind().open(tmp_path):
        gold = sample.target["answer"]
        right = gold if isinstance(gold, str) else gold[0]
        wrong = "no idea" if sample.target["type"] == "open" else next(x for x in "AB" if x != gold)
        for protocol in kind.protocols.values():
            assert protocol(right, sample.target).outcome is Outcome.RIGHT
            assert not protocol(wrong, sample.target).right


def judged(id, subject, verdict):
    groups = {"subject": subject, "discipline": DISCIPLINE_OF[subject]}
    return Judged(id, 0, {}, id, groups, False, verdict)


def test_the_official_figure_and_what_guessing_adds():
    right, wrong = Verdict(Outcome.RIGHT, "A"), Verdict(Outcome.WRONG, "B")
    found = [
        judged("1", "Art", right), judged("2", "Art", wrong), judged("3", "Math", wrong),
        judged("4", "Math", Verdict(Outcome.UNPARSED, chance=0.25)),
        judged("5", "Math", Verdict(Outcome.UNPARSED)), judged("6", "Math", right),
        judged("7", "Math", Verdict(Outcome.TRUNCATED, chance=0.5)),
    ]  # fmt: skip
    overall, guessing = Mmmu().metrics("official", found)
    assert (overall.name, overall.value) == ("overall", 0.286)
    assert overall.parts == {"Art & Design": 0.5, "Science": 0.2}
    assert (guessing.name, guessing.value) == ("expected with guessing", 0.393)
    assert Mmmu().metrics("strict", found) == Mmmu().metrics("official", []) == []


@pytest.mark.skipif(not RECORDS.is_dir(), reason=f"no recorded judgements at {RECORDS}")
def test_the_figures_of_a_recorded_run_are_the_official_ones():
    with (RECORDS / "mmmu-val-llava1.5-13b.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    results = json.loads((RECORDS / "mmmu-val-llava1.5-13b.results.json").read_text())
    assert {record["subject"] for record in records} == set(DISCIPLINE_OF)
    found = []
    for record in records:
        options = record.get("index2ans", {})
        kind = "multiple-choice" if options else "open"
        target = {"type": kind, "answer": record["answer"], "options": options}
        found.append(judged(record["id"], record["subject"], mmmu.official(record["response"], target)))
    overall, guessing = Mmmu().metrics("official", found)
    guessed = sum(1 for one in found if one.verdict.chance)
    assert guessed <= 2
    assert overall.value <= guessing.value <= overall.value + 0.003
    assert abs(overall.value - 0.367) <= guessed / len(records) + 5e-4
    for name, subjects in DISCIPLINES.items():
        parts = [results[subject] for subject in subjects.split()]
        total = sum(part["num_example"] for part in parts)
        official = sum(part["acc"] * part["num_example"] for part in parts) / total
        assert abs(overall.parts[name] - official) <= guessed / total + 5e-4
