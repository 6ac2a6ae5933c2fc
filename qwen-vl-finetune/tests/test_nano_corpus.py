"""The generated corpus: repeatable, truthful, and a stranger to easy-vqa."""

import json

import easy_vqa
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl.nano.corpus import (
    CELL,
    COLOUR_NAMES,
    COUNT_WORDS,
    PLURAL,
    SHAPES,
    SIZE,
    cell_labels,
    converse,
    draw,
    make_scene,
    write_corpus,
    write_skill_tests,
)

SEEDS = st.integers(0, 2**40)


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_a_seed_gives_the_same_picture_and_the_same_questions(seed):
    first, second = make_scene(seed), make_scene(seed)
    assert np.array_equal(np.asarray(draw(first)), np.asarray(draw(second)))
    assert converse(first) == converse(second)
    assert draw(first).size == (SIZE, SIZE)


def truth(question: str, things) -> str | None:
    """The answer worked out from the question's own words, for the forms that one can be worked out for."""
    words = question.lower().replace("?", "").replace("'s", "").replace(".", "").replace(":", "").split()
    plurals = {plural: shape for shape, plural in PLURAL.items()}
    shapes = [word for word in words if word in SHAPES] + [plurals[word] for word in words if word in plurals]
    colours = [word for word in words if word in COLOUR_NAMES]
    matching = [
        t for t in things if (not shapes or t.shape in shapes) and (not colours or t.colour in colours)
    ]
    if "how many" in question.lower() or words[0] == "count":
        return COUNT_WORDS[len(matching)]
    if "missing" in words or "unable" in words:
        return "no" if matching else "yes"
    if words[0] in ("can", "yes", "do"):
        return "yes" if matching else "no"
    if "colour" in words:
        return matching[0].colour if len(matching) == 1 else None
    if "shape" in words:
        return matching[0].shape if len(matching) == 1 else None
    return None


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_answers_are_true(seed):
    scene = make_scene(seed, words=False)
    for question, answer in converse(scene):
        expected = truth(question, scene.things)
        if expected is not None:
            assert answer == expected, (question, scene.things)
        elif answer.count(",") or question.startswith(("List", "Describe", "What do")):
            assert sorted(answer.split(", ")) == sorted(f"{t.colour} {t.shape}" for t in scene.things)
        else:
            assert answer in {
                f"{row} {column}".strip() or "centre"
                for row in ("top", "", "bottom")
                for column in ("left", "", "right")
            }


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_the_cell_under_a_large_object_carries_its_name(seed):
    scene = make_scene(seed, most_things=1, words=False)
    shapes, colours = cell_labels(scene)
    for thing in scene.things:
        cell = int(min(thing.y, SIZE - 1) // CELL) * (SIZE // CELL) + int(min(thing.x, SIZE - 1) // CELL)
        assert SHAPES[shapes[cell] - 1] == thing.shape and COLOUR_NAMES[colours[cell] - 1] == thing.colour


def test_no_question_of_easy_vqa_is_ever_asked():
    theirs = {
        question.lower() for question in easy_vqa.get_train_questions()[0] + easy_vqa.get_test_questions()[0]
    }
    ours = {question.lower() for seed in range(4000) for question, _ in converse(make_scene(seed))}
    assert len(ours) > 200 and not ours & theirs


def test_a_corpus_is_written_once_in_the_training_format(tmp_path):
    annotations = write_corpus(tmp_path / "corpus", scenes=20, first_seed=0)
    rows = [json.loads(line) for line in annotations.read_text().splitlines()]
    assert 15 <= len(rows) <= 20
    for row in rows:
        assert (annotations.parent / row["image"]).is_file()
        turns = [turn["from"] for turn in row["conversations"]]
        assert turns == ["human", "gpt"] * (len(turns) // 2)
        assert sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1
    before = annotations.stat().st_mtime_ns
    assert write_corpus(tmp_path / "corpus", scenes=20, first_seed=0).stat().st_mtime_ns == before


def test_skill_tests_ask_one_question_of_their_kind(tmp_path):
    files = {path.stem: path for path in write_skill_tests(tmp_path / "skills", questions=20)}
    answers = {
        skill: [json.loads(line)["conversations"][1]["value"] for line in path.read_text().splitlines()]
        for skill, path in files.items()
    }
    assert {len(given) for given in answers.values()} == {20}
    assert set(answers["presence"]) == {"yes", "no"} and set(answers["colour"]) <= set(COLOUR_NAMES)
    assert set(answers["shape"]) <= set(SHAPES) and set(answers["count"]) <= set(COUNT_WORDS)
