"""RealWorldQA: what a row of RealWorldQA.tsv becomes, and what is told of a bad one."""

import pytest

from qwenvl_eval.samples import picture, write_sample, write_tsv
from qwenvl_eval.samples.realworldqa import COLUMNS
from qwenvl_eval.scoring import Outcome
from qwenvl_eval.tasks.realworldqa import LETTER, SHORT, Realworldqa

DOT = picture(("circle", "red", 64, 64), kind="JPEG")


def row(index="0", **cells):
    return {
        "index": index, "question": "Which?", "A": "red", "B": "blue", "answer": "B", "image": DOT,
    } | cells  # fmt: skip


def samples(folder, *rows, **options):
    folder = folder / str(len(list(folder.iterdir())))
    write_tsv(folder / "RealWorldQA.tsv", COLUMNS, rows)
    return list(Realworldqa(**options).open(folder))


def test_options_and_one_word_answers(tmp_path):
    choice, word = samples(tmp_path, row(), row("1", A="", B="nan", answer="two"))
    image, text = choice.messages[0]["content"]
    assert image == {"type": "image", "image": f"data:image/jpeg;base64,{DOT}"}
    assert text["text"] == f"Question: Which?\nOptions:\nA. red\nB. blue\n{LETTER}"
    assert choice.target == {
        "type": "multiple-choice", "answer": "B", "options": {"A": "red", "B": "blue"},
    }  # fmt: skip
    assert word.target == {"type": "open", "answer": "two", "options": {}}
    assert word.messages[0]["content"][1]["text"] == f"Question: Which?\n{SHORT}"
    assert [sample.groups for sample in (choice, word)] == [{"type": "multiple-choice"}, {"type": "open"}]


def test_an_answer_that_is_an_option_s_text_stands_for_its_letter(tmp_path):
    named, letter = samples(tmp_path, row(answer="Blue"), row("1", A="B", B="A", answer="A"))
    assert named.target["answer"] == "B"
    assert letter.target["answer"] == "A"


def test_questions_about_one_picture_are_one_cluster(tmp_path):
    other = picture(("square", "red", 64, 64))
    first, second, third = samples(tmp_path, row(), row("1", answer="A"), row("2", image=other))
    assert first.cluster == second.cluster != third.cluster


def test_pixel_limits_stand_on_the_picture(tmp_path):
    (sample,) = samples(tmp_path, row(), min_pixels=1024, max_pixels=4096)
    assert sample.messages[0]["content"][0] == {
        "type": "image", "image": f"data:image/jpeg;base64,{DOT}", "min_pixels": 1024, "max_pixels": 4096,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"answer": "C"}, r"row 2, column 'answer': 'C' is none of the options A, B"),
        ({"answer": "red", "B": "Red"}, r"row 2, column 'answer': 'red' is none of the options A, B"),
        ({"answer": ""}, r"row 2, column 'answer': is empty"),
        ({"image": "!" * 80}, r"row 2, column 'image': no base64"),
    ],
)
def test_a_bad_row_is_named(tmp_path, cells, told):
    with pytest.raises(ValueError, match=rf"RealWorldQA\.tsv: {told}"):
        samples(tmp_path, row(), row("1") | cells)


def test_the_right_answer_is_right_by_every_protocol_and_a_wrong_one_by_none(tmp_path):
    write_sample("realworldqa", tmp_path)
    found = list(Realworldqa().open(tmp_path))
    assert [sample.target["type"] for sample in found].count("open") == 2
    for sample in found:
        gold = sample.target["answer"]
        wrong = "purple" if sample.target["type"] == "open" else next(x for x in "AB" if x != gold)
        for protocol in Realworldqa.protocols.values():
            assert protocol(f"{gold}.", sample.target).outcome is Outcome.RIGHT
            assert not protocol(wrong, sample.target).right
