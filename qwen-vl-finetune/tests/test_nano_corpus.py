"""The training corpus: repeatable, truthful, in the training format, and a stranger to easy-vqa."""

import json
import re

import easy_vqa
import pytest

from qwen_vl_utils.grounding import parse_boxes, parse_points
from qwenvl.data.messages import read_sample
from qwenvl.nano import corpus
from qwenvl.nano.skills import things
from qwenvl.nano.skills.shapes import COLOURS, PLURAL, SHAPES


def test_the_mix_is_a_hundred_rows_and_any_hundred_hold_it():
    assert sum(corpus.MIX.values()) == 100
    for first in (0, 1234):
        rows = [corpus.lesson(place, 9_000_000) for place in range(first, first + 100)]
        assert sum(bool(row.frames) for row in rows) == sum(
            corpus.MIX[name] for name in ("direction", "order", "when")
        )
        assert sum(len(row.turns) > 1 for row in rows) > 30
    assert [row.turns for row in rows] == [
        corpus.lesson(place, 9_000_000).turns for place in range(1234, 1334)
    ]


def answer_of(question: str, placed) -> str | None:
    """The answer worked out from the question's own words, for the forms that one can be worked out for."""
    words = re.sub(r"[^a-z ]", " ", question.lower()).split()
    plurals = {plural: shape for shape, plural in PLURAL.items()}
    shapes = [word for word in words if word in SHAPES]
    colours = [word for word in words if word in COLOURS]
    many = [plurals[word] for word in words if word in plurals]
    items = [one.item for one in placed]
    if many and ("many" in words or "count" in words):
        return str(sum(item.shape == many[0] for item in items))
    if "things" in words or "everything" in words:
        return str(len(items))
    if "colour" in words:
        return " ".join(item.colour for item in items if item.colour and item.shape == shapes[0])
    if ("shape" in words or "thing" in words) and colours and not shapes:
        return " ".join(item.shape for item in items if item.colour == colours[0])
    return None


def test_answers_about_scenes_are_true(monkeypatch):
    seen, original = [], corpus.canvas.scatter
    monkeypatch.setattr(corpus.canvas, "scatter", lambda *given: seen.append(original(*given)) or seen[-1])
    checked, forms = 0, set()
    for seed in range(300):
        lesson = corpus.scene(corpus.Random(seed))
        placed = seen[-1]
        names = {one.item.name: one for one in placed}
        assert 1 <= len(lesson.turns) <= corpus.TURNS
        for asked, answer in lesson.turns:
            question = asked.removeprefix("<image>")
            if (expected := answer_of(question, placed)) is not None:
                checked += 1
                assert answer == expected, (seed, question)
            elif answer.startswith('{"bbox_2d"'):
                (box,) = parse_boxes(answer).items
                one = names[box.label]
                assert list(box.xyxy) == pytest.approx([1000 * v / 128 for v in one.box], abs=1)
                forms.add("box")
            elif answer.startswith('{"point_2d"'):
                (point,) = parse_points(answer).items
                one = names[point.label]
                assert one.box[0] <= 0.128 * point.x <= one.box[2]
                forms.add("point")
            elif question.startswith(("Can you see a", "Yes or no:")):
                name = re.split("see a |no: ", question)[1].rstrip("?")
                assert answer == ("yes" if name in names else "no")
                forms.add("present")
            elif question.startswith(("Where do you find", "In which part")):
                one = names[re.split("find the |lies the ", question)[1].rstrip("?")]
                x, y = one.centre
                for word, holds in (("left", x < 43), ("right", x > 85), ("top", y < 43), ("bottom", y > 85)):
                    assert (word in answer) == holds, (seed, question)
                forms.add("place")
            elif "seen from" in question:
                one, other = (names[name] for name in re.findall("the ([a-z ]+?)(?: seen|:)", question))
                assert things.side_of(one, other) == answer
                forms.add("side")
    assert checked > 300 and forms == {"box", "point", "present", "side", "place"}


def test_no_question_of_easy_vqa_is_ever_asked():
    both = (easy_vqa.get_train_questions(), easy_vqa.get_test_questions())
    asked = {question.lower() for questions, *_ in both for question in questions}
    assert len(asked) > 50
    lessons = [corpus.lesson(place, 1_000_000) for place in range(1000)]
    assert not asked & {
        re.sub("<image>|<video>", "", question).lower() for lesson in lessons for question, _ in lesson.turns
    }


def test_rows_are_read_by_training_and_a_stopped_corpus_goes_on(tmp_path):
    annotations = corpus.write_corpus(tmp_path, rows=100, processes=1)
    rows = [json.loads(line) for line in annotations.read_text().splitlines()]
    assert len(rows) == 100
    for row in rows:
        sample = read_sample(row, str(tmp_path), re.compile(r"<\|[a-z_]+\|>"))
        assert sample.messages[-1]["content"]
    before = annotations.read_bytes()
    annotations.unlink()
    drawn = next(tmp_path.glob("media-00000/*.png"))
    drawn.unlink()  # a finished part is not drawn again
    assert corpus.write_corpus(tmp_path, rows=100, processes=1).read_bytes() == before
    assert not drawn.exists()
