"""Figures of scores, by hand."""

import numpy as np
import pytest

from fomoe.evaluation.statistics import ratio_interval
from fomoe.sim.bounds import Uses
from fomoe.sim.group import COSTS
from fomoe.sim.policies import parse_policy
from fomoe.sim.replay import Score
from fomoe.sim.report import bounds_of, figures_of, gap_of, table_of
from fomoe.traces import Passage, Trace, TraceFacts, cut_rows

FACTS = TraceFacts(model="m", n_layers=2, n_experts=10, top_k=2, expert_bytes=(10, 30))


def trace_of(domains):
    rows = cut_rows(np.random.default_rng(0).normal(size=(2, 1, 10)))
    return Trace.of(FACTS, [
        (Passage(sequence=i, tokens=[1], position=0, domain=domain), rows)
        for i, domain in enumerate(domains)
    ])  # fmt: skip


def score_of(policy, texts):
    """Texts as lists of {cost: value or [layer 0, layer 1]}."""
    costs = np.zeros((len(texts), 2, len(COSTS)))
    for i, text in enumerate(texts):
        for name, value in text.items():
            costs[i, :, COSTS.index(name)] = value
    return Score(parse_policy(policy), 4, costs)


def test_figures_by_hand():
    score = score_of("price=0.1+lfru", [
        {"tokens": 5, "wanted": 10, "demand": [1, 2], "background": [0, 3], "substituted": 2,
         "lost_mass": [1.0, 2.0], "router_kl": 0.5},
        {"tokens": 15, "wanted": 30, "demand": [7, 0], "dropped": [3, 0], "lost_squares": 3.0},
    ])  # fmt: skip
    figures = figures_of(score, trace_of(["code", "prose"]))
    assert (figures["policy"], figures["capacity"], figures["tokens"]) == ("price=0.1+lfru", 4, 20)
    assert figures["demand"] == pytest.approx(10 / 80)
    assert figures["background"] == pytest.approx(3 / 80)
    assert figures["substituted"] == pytest.approx(4 / 80)
    assert figures["dropped"] == pytest.approx(3 / 80)
    assert figures["demand_bytes"] == pytest.approx((8 * 10 + 2 * 30) / 20)
    assert figures["background_bytes"] == pytest.approx(3 * 30 / 20)
    assert figures["lost_mass"] == pytest.approx(3 / 40)
    assert figures["lost_squares"] == pytest.approx(6 / 40)
    code = figures["by_domain"]["code"]
    assert (code["tokens"], code["demand"]) == (5, pytest.approx(3 / 20))
    assert code["demand_bytes"] == pytest.approx((1 * 10 + 2 * 30) / 5)
    assert figures["by_domain"]["prose"]["background_bytes"] == 0
    first, second = figures["by_layer"]
    assert first["demand"] == pytest.approx(8 / 40)
    assert second["lost_mass"] == pytest.approx(2 / 20)


def test_the_share_of_the_gap():
    def demand(policy, *values):
        return score_of(policy, [{"tokens": 10, "wanted": 20, "demand": v} for v in values])

    lru, best = demand("lru", 10, 12, 9, 11, 10), demand("belady", 4, 6, 5, 5, 4)
    gap = gap_of(demand("lfru", 8, 9, 7, 8, 6), lru, best)
    assert gap["share"] == pytest.approx(14 / 28)
    assert gap["points"] == pytest.approx(100 * 28 / 200)
    low, high = gap["share_interval"]
    assert 0.35 < low < 0.5 < high < 0.65
    assert gap["points_interval"][0] > 0
    assert gap_of(lru, lru, best)["share"] == 0
    assert gap_of(best, lru, best)["share_interval"] == (1, 1)
    few = gap_of(demand("lfru", 7), demand("lru", 10), demand("belady", 4))
    assert (few["share"], few["share_interval"]) == (0.5, None)
    assert gap_of(best, best, best)["share"] == 0


def test_intervals_cover_as_they_say():
    """95 % intervals of a ratio whose truth is known, over 300 draws of 40 texts."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        sizes = rng.integers(50, 150, 40).astype(np.float64)
        low, high = ratio_interval(rng.binomial(sizes.astype(int), 0.3).astype(np.float64), sizes)
        hits += low <= 0.3 <= high
    # Percentile intervals of 40 texts cover a point or two less; four standard errors are 5.
    assert 0.88 < hits / 300 < 0.99


def test_bounds_are_per_token_and_layer():
    weights, nothing = np.array([0.5, 0.25, 0.25]), np.zeros(3, np.int64)
    layers = [Uses(weights, nothing, np.ones(3, np.bool_), 0, size) for size in FACTS.expert_bytes]
    score = score_of("drop=0.1", [{"tokens": 3, "wanted": 6, "demand": [2, 0]}])
    bounds = bounds_of(score, layers)
    # 20 bytes: two experts of the first layer; of six (token, layer) rows.
    assert bounds["belady_knapsack"]["left_out"] == pytest.approx(1.25 / 6)
    assert bounds["relaxed_optimum"]["left_out"] == pytest.approx(1.25 / 6, rel=0.01)


def test_tables_have_a_line_for_each_policy_and_bound():
    trace = trace_of(["", ""])
    text = {"tokens": 3, "wanted": 6, "demand": 2, "lost_mass": 0.6}
    exact, lossy = score_of("lfru", [text, text]), score_of("car=0.5+lru", [text, text])
    figures = [figures_of(exact, trace), figures_of(lossy, trace)]
    figures[0]["gap"] = {"share": 0.25, "share_interval": (0.2, 0.3)}
    figures[1]["bounds"] = {"relaxed_optimum": {"left_out": 0.125, "lost_squares": 0.0625}}
    head, one, two, bound = table_of(figures)
    assert len({len(line) for line in (head, one, two, bound)}) == 1
    assert "33.33 %" in one
    assert one.endswith("25.0 % (20.0 to 30.0)")
    assert "0.2000" in two
    assert "relaxed optimum" in bound
    assert bound.index("0.1250") + 6 == head.index("left out") + len("left out")
    assert bound.index("0.0625") + 6 == head.index("lost w2") + len("lost w2")
