"""Scoring: properties, known formulas, an independent bootstrap, true coverage."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_eval.scoring import BlindAnswers, accuracy, exact_match, normalise
from qwenvl_eval.scoring.intervals import wilson

verdicts_by_picture = st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=30)


def flat(groups):
    pairs = [(verdict, picture) for picture, group in enumerate(groups) for verdict in group]
    return [verdict for verdict, _ in pairs], [picture for _, picture in pairs]


def test_normalisation_does_what_it_says_and_no_more():
    assert normalise("  Two\n Words. ") == "two words"
    assert normalise("ＡＢＣ") == "abc"
    assert normalise("STRASSE") == normalise("Straße")
    assert exact_match("Yes.", "yes")
    assert not exact_match("a cat", "cat")
    assert not exact_match("2", "two")
    assert not exact_match("1.5", "15")
    assert not exact_match("yes, it is", "yes")


@given(st.text(), st.text(alphabet=" \t\n\u00a0", max_size=4), st.text(alphabet=" \n.", max_size=4))
def test_white_space_and_final_stops_do_not_decide(text, before, after):
    assert exact_match(before + text + after, text)


@given(st.text(alphabet="abcxyz019", min_size=1), st.text(alphabet="abcxyz019", min_size=1))
def test_plain_words_match_only_themselves(one, other):
    assert exact_match(one.upper(), other) == (one == other)


@given(verdicts_by_picture)
def test_the_interval_holds_the_accuracy_and_stays_in_bounds(groups):
    score = accuracy(*flat(groups))
    assert 0 <= score.low <= score.value <= score.high <= 1
    assert score.low < score.high
    assert score.clusters == len(groups)


@given(verdicts_by_picture)
def test_order_and_names_of_pictures_do_not_matter(groups):
    verdicts, pictures = flat(groups)
    turned = accuracy(verdicts[::-1], [f"picture {p}" for p in pictures[::-1]])
    score = accuracy(verdicts, pictures)
    assert (turned.right, turned.total) == (score.right, score.total)
    assert (turned.low, turned.high) == pytest.approx((score.low, score.high), abs=1e-9)


@given(verdicts_by_picture)
def test_the_opposite_verdicts_give_the_mirrored_interval(groups):
    verdicts, pictures = flat(groups)
    score, mirrored = accuracy(verdicts, pictures), accuracy([not v for v in verdicts], pictures)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((score.low, score.high), abs=1e-9)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Published examples of Wilson's score interval: Newcombe 1998 (method 3), table I.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_independent_questions_give_the_published_wilson_interval(right, total, low, high):
    score = accuracy([True] * right + [False] * (total - right), range(total))
    assert (score.low, score.high) == pytest.approx((low, high), abs=6e-5)


def test_repeating_every_verdict_within_its_picture_adds_nothing():
    rng = np.random.default_rng(1)
    verdicts = list(rng.random(400) < 0.7)
    once = accuracy(verdicts, range(400))
    tenfold = accuracy(verdicts * 10, list(range(400)) * 10)
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high), abs=3e-4)


def clustered_verdicts(rng, pictures):
    """Pictures of 2 to 12 questions, each with its own difficulty."""
    groups = []
    for _ in range(pictures):
        ease = rng.beta(4, 1)
        groups.append(list(rng.random(rng.integers(2, 13)) < ease))
    return flat(groups)


def test_the_interval_agrees_with_a_bootstrap_over_pictures():
    rng = np.random.default_rng(2)
    verdicts, pictures = clustered_verdicts(rng, 250)
    score = accuracy(verdicts, pictures)
    sums = np.bincount(pictures, weights=verdicts)
    sizes = np.bincount(pictures)
    draws = rng.integers(0, 250, (20_000, 250))
    low, high = np.quantile(sums[draws].sum(1) / sizes[draws].sum(1), [0.025, 0.975])
    assert score.low == pytest.approx(low, abs=0.003)
    assert score.high == pytest.approx(high, abs=0.003)
    naive = wilson(score.value, score.total)
    assert score.high - score.low > 1.3 * (naive[1] - naive[0])


@pytest.mark.parametrize("pictures", [30, 200])
def test_ninety_five_percent_means_ninety_five_percent(pictures):
    """The true mean of a Beta(4, 1) is 0.8; an interval that holds it in 95 of 100 worlds is honest."""
    rng = np.random.default_rng(3)
    scores = [accuracy(*clustered_verdicts(rng, pictures)) for _ in range(1500)]
    coverage = np.mean([score.low <= 0.8 <= score.high for score in scores])
    assert 0.93 <= coverage <= 0.97


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no verdicts"):
        accuracy([], [])
    with pytest.raises(ValueError, match="2 verdicts but 1 clusters"):
        accuracy([True, False], ["a"])


def test_blind_answers_take_the_most_frequent_answer_to_the_same_question():
    blind = BlindAnswers([("colour?", "red"), ("colour?", "blue"), ("colour?", "red"), ("there?", "no")])
    assert blind.answer("colour?") == "red"
    assert blind.answer("there?") == "no"
    assert blind.answer("never asked") == "red"
    assert BlindAnswers([("q", "b"), ("q", "a")]).answer("q") == "a"
    with pytest.raises(ValueError, match="no training answers"):
        BlindAnswers([])


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from("abc")), min_size=1))
def test_no_answer_without_looking_beats_the_most_frequent_one(training):
    blind = BlindAnswers(training)
    for question in {question for question, _ in training}:
        answers = [answer for asked, answer in training if asked == question]
        assert answers.count(blind.answer(question)) == max(answers.count(a) for a in answers)


def test_scoring_needs_no_torch():
    code = (
        "import sys, qwenvl_eval.scoring; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
