"""Grouping by expert, and predictions of experts, against loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.routing import group_by_expert, predict_experts, route_exact


@st.composite
def token_ids(draw):
    """Ids [T, k], distinct in a row; some beyond 16 bits."""
    n_tokens, k = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    base = draw(st.sampled_from([0, 65_530]))
    row = st.lists(st.integers(base, base + 9), min_size=k, max_size=k, unique=True)
    return np.array(draw(st.lists(row, min_size=n_tokens, max_size=n_tokens)), dtype=np.int32)


@given(token_ids())
def test_pairs_are_sorted_by_expert_then_token(ids):
    groups = group_by_expert(ids)
    pairs = sorted((int(e), t) for t, row in enumerate(ids) for e in row)
    assert groups.pair_token.tolist() == [t for _, t in pairs]
    assert groups.experts.tolist() == sorted({e for e, _ in pairs})
    assert groups.pair_start[0] == 0
    assert groups.pair_start[-1] == len(pairs)
    for i, expert in enumerate(groups.experts):
        start, end = groups.pair_start[i : i + 2]
        assert [e for e, _ in pairs[start:end]] == [expert] * (end - start)
    weights = np.arange(ids.size, dtype=np.float32).reshape(ids.shape)
    arranged = groups.arrange(weights)
    for t, row in enumerate(ids):
        assert groups.order[t].tolist() == [pairs.index((e, t)) for e in sorted(row.tolist())]
        assert arranged[t].tolist() == [weights[t, row.tolist().index(e)] for e in sorted(row)]
    for name in ("experts", "pair_start", "pair_token", "order", "ranks"):
        assert getattr(groups, name).dtype == np.int32


def test_no_tokens_make_no_groups():
    groups = group_by_expert(np.empty((0, 4), dtype=np.int32))
    assert groups.pair_start.tolist() == [0]
    assert groups.experts.size == groups.pair_token.size == 0
    assert groups.order.shape == (0, 4)


def test_one_token_predicts_its_route():
    logits = np.random.default_rng(1).normal(size=(1, 64)).astype(np.float32)
    assert predict_experts(logits, 6).ids.tolist() == route_exact(logits, 6).ids[0].tolist()


def test_a_batch_predicts_the_surest_first():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.25, 0.1, 0.6]], dtype=np.float32))
    predicted = predict_experts(logits, 2)
    assert predicted.ids.tolist() == [3, 0, 1]
    margins = [0.5 / 0.85, 0.35 / 0.8, 0.15 / 0.8]  # over rank 3 of the surer row
    np.testing.assert_allclose(predicted.margins, margins, rtol=1e-5)


def test_all_experts_have_nothing_below_them():
    logits = np.log(np.array([[0.25, 0.75]], dtype=np.float32))
    predicted = predict_experts(logits, 2)
    np.testing.assert_allclose(predicted.margins, [0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_predictions_are_distinct_and_cover_every_top_k(n_tokens):
    logits = np.random.default_rng(2).normal(size=(n_tokens, 20)).astype(np.float32)
    predicted = predict_experts(logits, 5).ids.tolist()
    assert sorted(predicted) == np.unique(route_exact(logits, 5).ids).tolist()
