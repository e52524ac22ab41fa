"""Controllers of the price: bounded, repeatable, and near what they are to hold."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError
from fomoe.routing.price import (
    LEAST,
    MOST,
    NANO,
    OCTAVE,
    BudgetPrice,
    LossPrice,
    is_sampled,
    price_of,
)

SPENT = st.lists(st.integers(0, 10**10), max_size=60)
LOSSES = st.lists(st.integers(-10, 20 * NANO), max_size=60)


@given(st.integers(LEAST, MOST))
def test_the_price_is_a_power_of_two(log2):
    # 19 terms of the series leave less than an ulp; each of 18 steps may round by half of one.
    assert price_of(log2) == pytest.approx(2.0 ** (log2 / OCTAVE), rel=4e-16)


def test_whole_octaves_are_exact_and_prices_increase():
    assert [price_of(-n * OCTAVE) for n in range(21)] == [2.0**-n for n in range(21)]
    prices = [price_of(LEAST + i * (OCTAVE // 16)) for i in range(16 * 20 + 1)]
    assert all(a < b for a, b in pairwise(prices))


@given(st.integers(1, 10**12), SPENT)
def test_a_budgets_price_stays_in_bounds_and_repeats(budget, spent):
    first = second = BudgetPrice(budget)
    for one in spent:
        first, second = first.after(one), second.after(one)
        assert LEAST <= first.log2 <= MOST
        assert 2.0**-20 <= first.price <= 1.0
    assert first == second


@given(SPENT, st.integers(0, 60))
def test_tokens_may_be_split_anywhere(spent, where):
    whole = BudgetPrice(10**9)
    for one in spent:
        whole = whole.after(one)
    head = BudgetPrice(10**9)
    for one in spent[:where]:
        head = head.after(one)
    tail = BudgetPrice(10**9, head.log2)  # taken up again from its state
    for one in spent[where:]:
        tail = tail.after(one)
    assert tail == whole


@given(st.integers(1, 10**12), st.integers(0, 10**10))
def test_one_step_is_that_of_dual_descent(budget, spent):
    before = BudgetPrice(budget)
    after = before.after(spent)
    eta = math.log(2) / BudgetPrice.STEPS_PER_OCTAVE
    exponent = eta * (spent - budget) / budget
    if LEAST < after.log2 < MOST:
        assert after.price / before.price == pytest.approx(math.exp(exponent), rel=1e-8)


def reads_at(price, rng):
    """A token's reads: 480 wanted, a third of them missing, weights falling over ranks."""
    weights = rng.dirichlet(np.full(8, 2.0), size=60)
    missing = rng.random(weights.shape) < 0.35
    return int((missing & (weights >= price)).sum()) * 7_600_000


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_the_long_run_mean_is_near_the_budget(share):
    rng = np.random.default_rng(1)
    exact = np.mean([reads_at(0.0, rng) for _ in range(200)])
    controller, spent = BudgetPrice(int(share * exact)), []
    for _ in range(1500):
        spent.append(reads_at(controller.price, rng))
        controller = controller.after(spent[-1])
    # |mean - B| <= B / (eta T) x (range of the logarithm), by the telescoping sum.
    bound = controller.budget * BudgetPrice.STEPS_PER_OCTAVE * 20 / len(spent)
    assert abs(np.mean(spent) - controller.budget) <= bound
    assert np.mean(spent[300:]) == pytest.approx(controller.budget, rel=0.02)


def test_a_budget_out_of_reach_ends_at_the_highest_price():
    controller = BudgetPrice(1)
    for _ in range(100):
        controller = controller.after(10**9)
    assert controller.price == 1.0
    assert BudgetPrice(10**9).after(0).price < BudgetPrice(10**9).price


@given(st.floats(1e-6, 10.0), LOSSES)
def test_a_losss_price_stays_in_bounds_and_repeats(target, losses):
    first, second = LossPrice.towards(target), LossPrice.towards(target)
    for one in losses:
        first, second = first.after(one), second.after(one)
        assert LEAST <= first.log2 <= MOST
    assert first == second
    assert first.samples == len(losses)


@given(st.floats(1e-6, 10.0), st.integers(0, 40))
def test_a_higher_loss_never_gives_a_higher_price(target, seen):
    controller = LossPrice.towards(target)
    for _ in range(seen):
        controller = controller.after(0)
    prices = [
        controller.after(int(controller.target * times)).log2
        for times in (0.0, 0.5, 1.0, 2.0, 100.0)
    ]
    assert prices == sorted(prices, reverse=True)
    assert controller.after(controller.target).log2 < controller.log2 or controller.log2 == LEAST
    assert controller.after(0).log2 > controller.log2 or controller.log2 == MOST


def test_the_start_is_safe_and_grows_with_the_target():
    starts = [LossPrice.towards(10.0**-n).price for n in range(5)]
    assert starts == sorted(starts, reverse=True)
    assert LossPrice.towards(0.01).price <= 0.01
    # A word that costs a nat lowers the price, but not to nothing.
    shocked = LossPrice.towards(0.01).after(NANO)
    seen = LossPrice.MOST_TARGETS * LossPrice.towards(0.01).target
    assert shocked == LossPrice.towards(0.01).after(seen)
    later = LossPrice(10**7, 100, -4 * OCTAVE).after(NANO)
    assert 2.0**-7 < later.price < 2.0**-5


class Plant:
    """A model: its mean loss grows as a power of the price, each token's is heavy-tailed."""

    def __init__(self, seed, scale, power):
        self.rng = np.random.default_rng(seed)
        self.scale, self.power = scale, power

    def mean(self, price):
        return self.scale * price**self.power

    def loss(self, price):
        spread = 1.2  # of the logarithm; the mean of exp(N(-s^2/2, s)) is 1
        return self.mean(price) * math.exp(self.rng.normal(-(spread**2) / 2, spread))


def held(plant, target, every, tokens):
    """Run the controller; returns each token's true mean loss at the price that it had."""
    controller, means = LossPrice.towards(target), []
    for step in range(tokens):
        price = controller.price
        means.append(plant.mean(price))
        if is_sampled(step, every):
            controller = controller.after(round(plant.loss(price) * NANO))
    return np.array(means)


@pytest.mark.parametrize("scale", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("power", [1.5, 2.0])
@pytest.mark.parametrize("target", [0.003, 0.01])
def test_a_sampled_loss_is_held(scale, power, target):
    runs = np.array([held(Plant(seed, scale, power), target, 16, 1200) for seed in range(24)])
    # The first tokens are safe, whatever the model is like.
    assert runs[:, :16].mean() <= target
    assert runs.mean() <= target
    # After 200 tokens the loss is used, not avoided.
    assert 0.7 * target <= runs[:, 200:].mean() <= target


@given(st.integers(1, 200), st.integers(0, 10**6))
def test_one_step_of_each_block_is_sampled(every, block):
    steps = range(block * every, (block + 1) * every)
    assert sum(is_sampled(step, every) for step in steps) == 1


def test_samples_fall_everywhere_in_their_blocks():
    offsets = [step % 16 for step in range(16 * 400) if is_sampled(step, 16)]
    counts = np.bincount(offsets, minlength=16)
    assert counts.min() >= 10  # 25 expected; a binomial falls below 10 once in 3,000 cells
    assert not any(is_sampled(step, 0) for step in range(100))


def test_nothing_is_held_below_one():
    for wrong in (lambda: BudgetPrice(0), lambda: LossPrice(0, 0, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            wrong()
