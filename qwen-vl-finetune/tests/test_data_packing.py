"""Packs: every sample once, two budgets kept and filled, the same plan wherever it is made."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl.data.packing import balanced_order, plan_packs

SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 900)), min_size=1, max_size=80)


def realistic(count: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens, patches: texts of 20 to 4000 tokens, none to four pictures of 256 to 16384 patches, videos."""
    random = np.random.default_rng(7)
    text = np.clip(random.lognormal(5.3, 1.0, count), 20, 4000).astype(int)
    pictures = random.choice(5, count, p=[0.3, 0.45, 0.12, 0.08, 0.05])
    sizes = np.clip(random.lognormal(7.6, 0.9, (4, count)), 256, 16384).astype(int) // 4 * 4
    patches = (sizes * (np.arange(4)[:, None] < pictures)).sum(0)
    videos = random.random(count) < 0.05
    patches[videos] = random.integers(500, 6000, videos.sum()) * 4
    return text + patches // 4, patches


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(300, 2000), st.none() | st.integers(900, 5000), st.integers(0, 3))
def test_every_sample_once_and_no_budget_exceeded(sizes, token_budget, patch_budget, seed):
    tokens, patches = np.array(sizes).T
    packs = plan_packs(tokens, patches, token_budget, patch_budget, seed)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    for pack in packs:
        assert tokens[pack].sum() <= token_budget
        assert patch_budget is None or patches[pack].sum() <= patch_budget
    again = plan_packs(tokens, patches, token_budget, patch_budget, seed)
    assert [pack.tolist() for pack in again] == [pack.tolist() for pack in packs]


@pytest.mark.parametrize("patch_budget", [None, 65536, 49152, 32768], ids=str)
def test_the_tighter_budget_is_filled_to_98_percent(patch_budget):
    """Of the two budgets at 49152 neither is the tighter one."""
    tokens, patches = realistic(20_000)
    fits = (tokens <= 16384) & (patches <= (patch_budget or np.inf))
    tokens, patches = tokens[fits], patches[fits]
    packs = plan_packs(tokens, patches, 16384, patch_budget, seed=0)
    shares = [tokens.sum() / 16384, patches.sum() / (patch_budget or np.inf)]
    assert max(shares) / len(packs) >= 0.98


def test_another_seed_gives_other_packs_of_as_many():
    tokens, patches = realistic(2_000)
    one, other = (plan_packs(tokens, patches, 32768, 98304, seed) for seed in (0, 1))
    assert {tuple(sorted(pack)) for pack in one} != {tuple(sorted(pack)) for pack in other}
    assert abs(len(one) - len(other)) <= 1


@pytest.mark.parametrize(("tokens", "patches"), [(101, 4), (4, 401)])
def test_a_sample_larger_than_a_budget_is_refused(tokens, patches):
    sizes = np.array([5, tokens]), np.array([4, patches])
    with pytest.raises(ValueError, match=r"sample 1: .01 (tokens|patches) exceed the budget of .00 a pack"):
        plan_packs(*sizes, 100, 400, seed=0)


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_a_balanced_order_holds_every_pack_once(costs, together, seed):
    order = balanced_order(np.array(costs), together, [seed, 0])
    assert sorted(order.tolist()) == list(range(len(costs)))


def test_what_processes_do_in_one_step_costs_alike():
    costs = np.random.default_rng(0).lognormal(10, 0.5, 4_003)
    order = balanced_order(costs, 8, [0, 0])
    assert not np.array_equal(order, balanced_order(costs, 8, [0, 1]))
    steps = costs[order[:4_000]].reshape(-1, 8)
    # A step takes as long as its slowest process.
    assert steps.mean() / steps.max(1).mean() > 0.95
    shuffled = np.random.default_rng(1).permutation(costs)[:4_000].reshape(-1, 8)
    assert shuffled.mean() / shuffled.max(1).mean() < 0.6
    # Cheap and dear steps come mixed.
    halves = np.split(steps.sum(1), 2)
    assert abs(halves[0].mean() / halves[1].mean() - 1) < 0.1
