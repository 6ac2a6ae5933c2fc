"""Metrics for texts and boxes, held against definitions written out."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_eval.scoring import text
from qwenvl_eval.scoring.verdict import Outcome

short = st.text("abc é1", max_size=8)
corner = st.integers(0, 12)
boxes = st.tuples(corner, corner, corner, corner).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@functools.cache
def distance(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    return min(
        distance(one[1:], other) + 1,
        distance(one, other[1:]) + 1,
        distance(one[1:], other[1:]) + (one[0] != other[0]),
    )


@settings(deadline=None)
@given(short, short)
def test_similarity_is_one_less_the_normalised_distance(one: str, other: str) -> None:
    longer = max(len(one), len(other))
    expected = 1 - distance(one, other) / longer if longer else 1.0
    assert math.isclose(text.edit_similarity(one, other), expected)


@settings(deadline=None)
@given(short, st.lists(short, min_size=1, max_size=3))
def test_anls_is_the_best_gold_and_zero_from_half_the_length_on(answer: str, golds: list[str]) -> None:
    def score(gold: str) -> float:
        one, other = (" ".join(t.lower().split()) for t in (answer, gold))
        longer = max(len(one), len(other))
        away = distance(one, other) / longer if longer else 0.0
        return 1 - away if away < 0.5 else 0.0

    assert math.isclose(text.anls_score(answer, golds), max(map(score, golds)))


@settings(deadline=None)
@given(boxes, boxes)
def test_box_overlap_is_that_of_the_unit_squares_inside(
    one: tuple[int, int, int, int], other: tuple[int, int, int, int]
) -> None:
    def cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    both, either = cells(one) & cells(other), cells(one) | cells(other)
    assert math.isclose(text.box_iou(one, other), len(both) / len(either) if either else 0.0)


def test_boxes_with_the_corners_the_wrong_way_round_have_no_area() -> None:
    assert text.box_iou((10, 10, 0, 0), (10, 10, 0, 0)) == 0
    with pytest.raises(ValueError, match="a box is x1, y1, x2, y2"):
        text.box_iou((1, 2, 3), (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("answer", "outcome", "score"),
    [
        ("Rue de la Paix", Outcome.RIGHT, "1.0000"),
        ("rue  de la PAIX", Outcome.RIGHT, "1.0000"),
        ("rue de la pai", Outcome.RIGHT, "0.9286"),
        ("abcd", Outcome.WRONG, "0.0000"),
        ("abcdwxyz", Outcome.WRONG, "0.0000"),  # half of it exactly is another
        ("abcdexyz", Outcome.RIGHT, "0.6250"),
        (" ", Outcome.UNPARSED, ""),
    ],
)
def test_anls_is_a_protocol(answer: str, outcome: Outcome, score: str) -> None:
    verdict = text.anls(answer, {"answer": ["abcdefgh", "Rue de la Paix"]})
    assert verdict.outcome is outcome
    assert verdict.extracted[:6] == score


def test_anls_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gold texts"):
        text.anls_score("a", [])


def test_edit_distance_is_right_from_the_similarity_on_that_the_target_says() -> None:
    assert text.edit_distance("kitten", {"answer": "sitting", "similarity": 0.5}).right
    assert not text.edit_distance("kitten", {"answer": "sitting", "similarity": 0.6}).right
    assert text.edit_distance("kitten", {"answer": ["x", "kitten"]}).extracted == "1.0000 kitten"
    assert not text.edit_distance("Kitten", {"answer": "kitten"}).right
    assert not text.edit_distance("a", {"answer": "b", "similarity": 0.0}).right
    assert text.edit_distance("", {"answer": ""}).outcome is Outcome.UNPARSED


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ('```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]\n```', Outcome.RIGHT),
        ("(0, 0, 10.0, 9.5)", Outcome.RIGHT),
        ("[0, 0, 10, 5]", Outcome.RIGHT),  # one half exactly
        ("[0, 0, 10, 4.9]", Outcome.WRONG),
        ("[0,0,10,10] or rather [0.0, 0, 10, 10]", Outcome.RIGHT),
        ("[0,0,10,10] or [1,1,10,10]", Outcome.UNPARSED),
        ("[0, 0, 10]", Outcome.UNPARSED),
        ("[0, 0, 10, 10, 5]", Outcome.UNPARSED),
        ("there is no cat", Outcome.UNPARSED),
    ],
)
def test_one_box_is_read_wherever_it_stands(answer: str, outcome: Outcome) -> None:
    assert text.iou(answer, {"boxes": [[0, 0, 10, 10]]}).outcome is outcome


def test_the_overlap_that_is_wanted_stands_in_the_target() -> None:
    assert not text.iou("[0, 0, 10, 8]", {"boxes": [[0, 0, 10, 10]], "iou": 0.81}).right
    assert text.iou("[0, 0, 10, 8]", {"boxes": [[0, 0, 10, 10]], "iou": 0.8}).extracted == (
        "0.8000 [0.0, 0.0, 10.0, 8.0]"
    )


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4), min_size=1, max_size=4), st.randoms())
def test_several_boxes_pair_as_well_as_any_pairing_can(corners, random) -> None:
    wanted = [(min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1) for a, b, c, d in corners]
    found = [tuple(number + random.randint(-2, 2) for number in box[:2]) + box[2:] for box in wanted]
    random.shuffle(found)
    best = max(
        min(text.box_iou(one, other) for one, other in zip(wanted, order, strict=True))
        for order in itertools.permutations(found)
    )
    assert text.worst_overlap(wanted, found) == best
    assert text.worst_overlap(wanted, found[1:]) == 0


def test_as_many_boxes_are_wanted_as_the_target_has() -> None:
    target = {"boxes": [[0, 0, 10, 10], [20, 20, 30, 30]]}
    assert text.iou("[20, 20, 30, 30], [0, 0, 10, 9]", target).extracted.startswith("0.9000 ")
    assert text.iou("[20, 20, 30, 30]", target).outcome is Outcome.WRONG
    assert text.iou("[20, 20, 30, 30], [0, 0, 10, 4]", target).outcome is Outcome.WRONG


def test_exact_takes_any_of_the_golds() -> None:
    assert text.exact(" Yes. ", {"answer": "yes"}).right
    assert text.exact("yes", {"answer": ["no", "Yes"]}).right
    assert text.exact("maybe", {"answer": ["no", "yes"]}).outcome is Outcome.WRONG
    assert text.exact("", {"answer": ""}).outcome is Outcome.UNPARSED
