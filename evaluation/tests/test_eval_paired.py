"""Comparing two runs: published worked examples, brute force, and simulation."""

import itertools
import math
import random
import statistics
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_eval.scoring.intervals import Z95
from qwenvl_eval.scoring.paired import compare, mcnemar, questions_needed, sign_flip, tango


def verdicts(both, only_first, only_second, neither):
    """(first, second, one cluster per question)."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second, range(len(first))


def test_airway_reactivity_before_and_after_transplantation():
    """Bentur et al. 2009, the worked example of Fagerland, Lydersen and Laake: 1, 1, 7 and 12 children."""
    result = compare(*verdicts(1, 1, 7, 12))
    assert result.difference == pytest.approx(6 / 21)
    assert result.mcnemar == pytest.approx(0.0703, abs=5e-5)
    assert (result.low, result.high) == pytest.approx((0.026, 0.517), abs=5e-4)


def test_approval_of_the_prime_minister():
    """Agresti, Categorical Data Analysis: 794, 150, 86 and 570 voters; z = -4.17, Wald -0.06 to -0.02."""
    result = compare(*verdicts(794, 150, 86, 570))
    assert result.difference == pytest.approx(-0.04)
    assert (result.low, result.high) == pytest.approx((-0.06, -0.02), abs=2e-3)
    z = (86 - 150) / math.sqrt(86 + 150)
    assert z == pytest.approx(-4.17, abs=5e-3)
    assert result.mcnemar == pytest.approx(math.erfc(-z / math.sqrt(2)), rel=0.25)


counts = st.integers(0, 30)


@given(counts, counts)
def test_mcnemar_is_the_binomial_tail(b, c):
    tail = sum(math.comb(b + c, k) for k in range(b + c + 1) if abs(2 * k - b - c) >= abs(b - c))
    assert mcnemar(b, c) == pytest.approx(tail / 2 ** (b + c))
    assert mcnemar(b, c) == mcnemar(c, b)


pairs = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.integers(0, 8)),
    min_size=1,
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(pairs)
def test_sign_flip_is_the_share_of_all_swaps_that_are_as_far_out(rows):
    differences = [second - first for first, second, _ in rows]
    clusters = [cluster for *_, cluster in rows]
    names = sorted(set(clusters))
    observed = abs(sum(differences))
    far = 0
    for signs in itertools.product((-1, 1), repeat=len(names)):
        sign = dict(zip(names, signs, strict=True))
        swapped = sum(sign[cluster] * d for d, cluster in zip(differences, clusters, strict=True))
        far += abs(swapped) >= observed
    assert sign_flip(differences, clusters) == pytest.approx(far / 2 ** len(names))


@given(counts, counts, counts, counts.filter(bool))
def test_with_one_question_a_picture_sign_flip_is_mcnemar(both, only_first, only_second, neither):
    result = compare(*verdicts(both, only_first, only_second, neither))
    assert result.sign_flip == pytest.approx(result.mcnemar)
    assert result.design_effect == pytest.approx(1)
    assert result.total == both + only_first + only_second + neither


@given(pairs)
def test_swapping_the_runs_turns_the_signs(rows):
    first, second, clusters = zip(*rows, strict=True)
    one, other = compare(first, second, clusters), compare(second, first, clusters)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert (one.mcnemar, one.sign_flip) == pytest.approx((other.mcnemar, other.sign_flip))
    assert -1 <= one.low <= one.difference <= one.high <= 1
    assert 0 < one.sign_flip <= 1 and one.design_effect >= 1


@given(pairs, st.integers(2, 4))
def test_asking_each_question_again_says_nothing_new(rows, times):
    """Copies within a picture: the same interval but for small-sample terms, the same sign-flip p value."""
    first, second, _ = zip(*rows, strict=True)
    clusters = list(range(len(rows)))
    once = compare(first, second, clusters)
    again = compare(first * times, second * times, clusters * times)
    assert again.sign_flip == pytest.approx(once.sign_flip)
    assert again.high - again.low >= once.high - once.low - 1e-6
    assert again.mcnemar <= once.mcnemar + 1e-12


@given(st.integers(1, 60), st.integers(1, 60), st.integers(130, 400))
def test_tango_solves_its_equation(gained, lost, total):
    """The likelihood under the limit, maximised by search, gives a score of 1.96 there."""
    for limit, sign in zip(tango(gained, lost, total), (1, -1), strict=True):

        def likelihood(q, delta=limit):
            rest = 1 - 2 * q - delta
            cells = ((gained, q + delta), (lost, q), (total - gained - lost, rest))
            return (
                sum(count * math.log(p) for count, p in cells if count)
                if min(q, q + delta, rest) > 0
                else -math.inf
            )

        low, high = max(0.0, -limit), (1 - limit) / 2
        for _ in range(200):
            a, b = low + (high - low) * 0.382, low + (high - low) * 0.618
            low, high = (low, b) if likelihood(a) > likelihood(b) else (a, high)
        q = (low + high) / 2
        score = (gained - lost - total * limit) / math.sqrt(total * (2 * q + limit - limit**2))
        assert score == pytest.approx(sign * Z95, rel=1e-4)


def test_the_interval_is_the_cluster_robust_one_in_large_samples():
    generator = random.Random(5)
    first, second, clusters = simulate(generator, 2000, gain=0.05)
    result = compare(first, second, clusters)
    sums = [sum(second[i] - first[i] for i in range(3 * g, 3 * g + 3)) / 3 for g in range(2000)]
    error = statistics.stdev(sums) / math.sqrt(2000)
    assert result.low == pytest.approx(result.difference - Z95 * error, abs=0.0015)
    assert result.high == pytest.approx(result.difference + Z95 * error, abs=0.0015)
    assert 2 < result.design_effect < 3


@given(pairs)
def test_the_design_effect_is_the_ratio_of_the_two_variances(rows):
    """By the definition, pictures with different numbers of questions included."""
    differences = [second - first for first, second, _ in rows]
    groups = {
        cluster: [d for d, row in zip(differences, rows, strict=True) if row[2] == cluster]
        for *_, cluster in rows
    }
    mean, count = statistics.fmean(differences), len(groups)
    if len(set(differences)) == 1 or count == 1:
        expected = len(rows) / count
    else:
        clustered = count / (count - 1) * sum(sum(d - mean for d in group) ** 2 for group in groups.values())
        expected = max(1, clustered / len(rows) / statistics.variance(differences))
    assert compare(*zip(*rows, strict=True)).design_effect == pytest.approx(expected)


def simulate(generator, pictures, gain):
    """Three questions a picture that mostly change together; the true difference is ``gain``."""
    first, second, clusters = [], [], []
    for picture in range(pictures):
        change = generator.random()
        for _ in range(3):
            draw = change if generator.random() < 0.9 else generator.random()
            state = (False, True) if draw < 0.1 + gain else (True, False) if draw > 0.9 else (True, True)
            first.append(state[0])
            second.append(state[1])
            clusters.append(picture)
    return first, second, clusters


def test_the_interval_holds_the_truth_and_the_test_its_level_where_questions_share_pictures():
    generator = random.Random(11)
    runs = 400
    held = wrong = naive_wrong = 0
    for _ in range(runs):
        first, second, clusters = simulate(generator, 60, gain=0)
        result = compare(first, second, clusters)
        held += result.low <= 0 <= result.high
        wrong += result.sign_flip < 0.05
        naive_wrong += result.mcnemar < 0.05
    assert held / runs > 0.925
    assert wrong / runs < 0.075
    assert naive_wrong / runs > 0.15, (
        "without clusters the test would be wrong this often: the simulation is too easy"
    )


@pytest.mark.parametrize(("difference", "discordant"), [(0.02, 0.1), (0.05, 0.2), (0.03, 0.06), (0.1, 0.5)])
def test_the_questions_needed_give_the_power_promised(difference, discordant):
    """Power of McNemar's test by adding up all outcomes."""
    n = questions_needed(difference, discordant)
    better = (discordant + difference) / 2 / discordant
    power = 0.0
    for changed in range(1, n + 1):
        share = binomial(n, changed, discordant)
        if share < 1e-9:
            continue
        power += share * sum(
            binomial(changed, k, better)
            for k in range(changed + 1)
            if abs(2 * k - changed) > Z95 * math.sqrt(changed)
        )
    assert 0.77 < power < 0.84


def binomial(n, k, p):
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))


def test_questions_needed_grow_with_power_noise_and_clusters():
    assert questions_needed(0.02, 0.1) < questions_needed(0.02, 0.1, power=0.9)
    assert questions_needed(0.02, 0.1) < questions_needed(0.02, 0.2)
    assert questions_needed(-0.02, 0.1, design_effect=2) == pytest.approx(
        2 * questions_needed(0.02, 0.1), abs=1
    )
    assert questions_needed(0.02, 0.1) == 1960, "(1.95996 sqrt(.1) + .84162 sqrt(.0996))^2 / .0004"


def test_runs_that_agree_everywhere_still_say_what_a_difference_would_need():
    result = compare([True, False] * 50, [True, False] * 50, range(100))
    assert (result.difference, result.mcnemar, result.sign_flip) == (0, 1, 1)
    assert result.low == pytest.approx(-result.high) and 0.02 < result.high < 0.05
    assert result.questions_for(0.05) == questions_needed(0.05, 0.05)


def test_questions_for_takes_disagreement_and_clusters_from_the_runs():
    first, second, clusters = simulate(random.Random(2), 200, gain=0.05)
    result = compare(first, second, clusters)
    discordant = (result.only_first + result.only_second) / result.total
    expected = questions_needed(0.03, discordant, power=0.9, design_effect=result.design_effect)
    assert (
        result.questions_for(0.03, power=0.9)
        == expected
        > 1.5 * questions_needed(0.03, discordant, power=0.9)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "nothing to compare"),
        (([True], [True, False], [1]), "1 verdicts of the first run, 2 of the second and 1 clusters"),
        (([True], [True], []), "0 clusters"),
    ],
)
def test_what_cannot_be_compared_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(*arguments)


@pytest.mark.parametrize("arguments", [(0, 0.1), (0.2, 0.1), (0.1, 1.1), (0.1, 0.2, 1), (0.1, 0.2, 0)])
def test_shares_that_cannot_be_are_told(arguments):
    difference, discordant, *power = arguments
    with pytest.raises(ValueError, match=r"difference=|power="):
        questions_needed(difference, discordant, **dict(zip(("power",), power, strict=False)))


def test_three_thousand_questions_take_no_time():
    generator = random.Random(1)
    first = [generator.random() < 0.5 for _ in range(3000)]
    second = [generator.random() < 0.55 for _ in range(3000)]
    began = time.process_time()
    result = compare(first, second, [place // 3 for place in range(3000)])
    assert time.process_time() - began < 5
    assert result.sign_flip < 0.05


def test_it_prints_points_interval_and_p():
    assert str(compare(*verdicts(1, 1, 7, 12))) == "+28.6 points [+2.6, +51.7], p = 0.0703"
