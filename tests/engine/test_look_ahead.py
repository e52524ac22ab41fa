"""What decode reads ahead: which levels pay, what the budget allows, when nobody looks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.engine.ahead import (
    DEPTHS,
    LEAST_COUNT,
    LEVELS,
    PROBE_TOKENS,
    WINDOW,
    AheadArrays,
    Governor,
    choose,
    least_precision,
)

EXPERT = 8 << 20


def arrays(named=(), wanted=(), misses=1000, budget=0.1):
    a = AheadArrays(3, 8, budget)
    a.named[0, : len(named)], a.wanted[0, : len(wanted)] = named, wanted
    a.misses[0] = misses
    return a


def test_a_guess_must_gain_more_than_it_risks():
    # A read fits into the window: it pays from p = c / (c + 1) on.
    assert least_precision(0.010, 0.004, 0.125) == pytest.approx(0.125 / 1.125)
    # A tenth of it does: ten times the odds.
    assert least_precision(0.0004, 0.004, 0.125) == pytest.approx(0.125 / 0.225)
    assert least_precision(0.0, 0.004, 0.125) == 1.0
    assert least_precision(0.001, 0.0, 1.0) == 0.5  # no read was ever waited for


@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.floats(1e-3, 1), st.floats(1.01, 5))
def test_a_longer_window_never_asks_for_more(window, read, in_vain, longer):
    least = least_precision(window, read, in_vain)
    assert 0 < least < 1
    assert least_precision(window * longer, read, in_vain) <= least


def test_the_surest_levels_within_the_budget():
    a = arrays(named=[400, 200, 100, 50], wanted=[100, 120, 90, 49], misses=1000, budget=0.1)
    choose(a, least=0.3, budget=0.1)
    # Charged twice: 2, then 20 more, then 160 more than the hundred that may be in vain.
    assert np.flatnonzero(a.allowed[0]).tolist() == [2, 3]
    choose(a, least=0.3, budget=0.2)
    assert np.flatnonzero(a.allowed[0]).tolist() == [1, 2, 3]
    choose(a, least=0.7, budget=1.0)
    assert np.flatnonzero(a.allowed[0]).tolist() == [2, 3]
    choose(a, least=0.2, budget=1.0)
    assert np.flatnonzero(a.allowed[0]).tolist() == [0, 1, 2, 3]


def test_what_is_hardly_known_is_not_read():
    a = arrays(named=[LEAST_COUNT - 1, LEAST_COUNT], wanted=[LEAST_COUNT - 1, LEAST_COUNT])
    choose(a, least=0.1, budget=1.0)
    assert np.flatnonzero(a.allowed[0]).tolist() == [1]
    choose(arrays(), least=0.0, budget=1.0)
    assert not arrays().allowed.any()


def test_the_surest_level_is_left_to_the_credit():
    a = arrays(named=[0, 500], wanted=[0, 400], misses=100, budget=0.01)
    choose(a, least=0.5, budget=0.01)
    assert a.allowed.sum() == 1


def governor(depth=2, budget=0.5, **counts):
    return Governor(arrays(budget=budget, **counts), depth=depth, expert_bytes=EXPERT)


SURE = {"named": [0] * 7 + [400], "wanted": [0] * 7 + [380]}


def token(g, *, stall, layers=4, window=0.004, took=0.010, used=0):
    for _ in range(layers):
        g.step(window, took, stall, 2, used)
    g.token()


def test_stalls_switch_looking_on_and_off():
    g = governor(**SURE)
    assert g.depth == 2
    token(g, stall=0.005)
    assert g.depth == 2
    assert g.arrays.allowed[0, LEVELS - 1]
    for _ in range(60):
        token(g, stall=0.0)
    assert g.depth == 0
    assert not g.arrays.allowed.any()
    token(g, stall=0.012)
    assert g.depth == 2


def test_stalls_that_guesses_avoid_keep_it_on():
    g = governor(**SURE)
    token(g, stall=0.005)
    for _ in range(60):
        token(g, stall=0.0, used=1)
    assert g.depth == 2


def test_guesses_that_do_not_pay_are_looked_at_now_and_then():
    vain = {"named": [200] * LEVELS, "wanted": [0] * LEVELS}
    g = governor(**vain)
    depths = []
    for _ in range(2 * PROBE_TOKENS):
        token(g, stall=0.005)
        depths.append(g.depth)
    assert not g.arrays.allowed.any()
    assert depths.count(2) == 2


def test_new_engines_look_until_they_know():
    g = governor()
    token(g, stall=0.005)
    assert g.depth == 2
    assert not g.arrays.allowed.any()


def test_depth_zero_stays_zero():
    g = governor(depth=0, **SURE)
    token(g, stall=0.005)
    assert g.depth == 0
    assert not g.arrays.allowed.any()


def test_without_a_budget_nobody_looks():
    g = governor(budget=0.0, **SURE)
    assert g.depth == 0
    token(g, stall=0.005)
    assert g.depth == 0


def test_counts_are_halved_together():
    a = {"named": [0] * 7 + [WINDOW + 10], "wanted": [0] * 7 + [WINDOW]}
    g = governor(**a, misses=900)
    token(g, stall=0.005)
    assert g.arrays.named[0, 7] == (WINDOW + 10) // 2
    assert g.arrays.wanted[0, 7] == WINDOW // 2
    assert g.arrays.misses[0] == 450


def test_what_was_never_read_is_paid_back_but_for_its_victim():
    g = governor()
    g.arrays.charged[1, 5] = True
    assert g.refund(1, 5, 1000)
    assert (g.arrays.credit[0], g.arrays.charged[1, 5]) == (1000, False)
    assert not g.refund(1, 5, 1000)
    assert g.arrays.credit[0] == 1000


def test_a_guess_that_a_prompt_wanted_is_paid_back_whole():
    g = governor()
    g.arrays.charged[1, [5, 6]] = True
    g.came_true(1, np.array([4, 5], np.int32), 1000)
    assert g.arrays.credit[0] == 2000
    assert not g.arrays.charged[1, 5]
    g.leave(1, 6)
    assert not g.refund(1, 6, 1000)
    assert g.arrays.credit[0] == 2000


def test_tables_have_room_for_every_depth():
    assert arrays().allowed.shape == (DEPTHS, LEVELS)
