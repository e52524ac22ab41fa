"""The native router against its definition in NumPy, to the bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import EngineError
from fomoe.routing import group_by_expert, predict_experts, reference, route_exact
from fomoe.routing.router import softmax

SIZES = [1, 2, 15, 16, 17, 31, 33, 128, 500, 512]


@st.composite
def scores(draw):
    """Logits [T, E] of many scales, some rounded so that they tie, some -inf, and a k."""
    n_tokens, n_experts = draw(st.integers(1, 5)), draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([1e-40, 0.1, 1.0, 4.0, 40.0, 1e30]))
    logits = rng.normal(0, spread, (n_tokens, n_experts)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)
    logits[rng.random(logits.shape) < draw(st.sampled_from([0.0, 0.3]))] = -np.inf
    logits[:, 0] = np.maximum(logits[:, 0], np.float32(-1e30))
    return logits, draw(st.integers(1, min(n_experts, 20)))


def same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


@given(scores())
def test_routes_have_the_bits_of_the_definition(case):
    logits, k = case
    with np.errstate(invalid="ignore", over="ignore"):
        ids, weights = reference.route(logits, k)
        probabilities = reference.softmax(logits)
        ranked, margins = reference.predict(logits, k)
    route = route_exact(logits, k)
    np.testing.assert_array_equal(route.ids, ids)
    same_bits(route.weights, weights)
    same_bits(softmax(logits), probabilities)
    predicted = predict_experts(logits, k)
    np.testing.assert_array_equal(predicted.ids, ranked)
    same_bits(predicted.margins, margins)


def test_the_power_is_near_that_of_float64():
    x = np.concatenate([np.linspace(-87, 0, 1_000_001), [-0.0, -1e-40]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(reference.exp_negative(x) - exact) / exact
    # An ulp is 1.2e-7 of a value at most; the last steps round twice, after errors below that.
    assert error.max() < 1.8e-7
    assert reference.exp_negative(np.array([-87.1, -1e30, -np.inf], np.float32)).tolist() == [0] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 500, 511])
def test_one_broken_score_breaks_its_row(bad, at):
    logits = np.zeros((2, 512), np.float32)
    logits[1, at] = bad
    for call in (lambda: route_exact(logits, 3), lambda: predict_experts(logits, 3)):
        with pytest.raises(EngineError, match="token 1 of 2"):
            call()


@pytest.mark.parametrize("n_tokens", [1, 4096])
def test_groups_of_many_tokens(n_tokens):
    """Against a stable sort."""
    rng = np.random.default_rng(n_tokens)
    ids = rng.random((n_tokens, 512)).argsort(axis=1)[:, :10].astype(np.int32)
    groups = group_by_expert(ids)
    by_expert = ids.ravel().argsort(kind="stable")
    np.testing.assert_array_equal(groups.experts, np.unique(ids))
    np.testing.assert_array_equal(groups.pair_token, by_expert // 10)
    sizes = np.bincount(ids.ravel(), minlength=512)
    np.testing.assert_array_equal(np.diff(groups.pair_start), sizes[groups.experts])
    np.testing.assert_array_equal(groups.ranks, ids.argsort(axis=1))
    pair_of = np.empty(ids.size, np.int32)
    pair_of[by_expert] = np.arange(ids.size)
    want = np.take_along_axis(pair_of.reshape(ids.shape), ids.argsort(axis=1), axis=1)
    np.testing.assert_array_equal(groups.order, want)


def test_an_id_that_no_model_has_is_refused():
    with pytest.raises(ValueError, match="expert id -1"):
        group_by_expert(np.array([[3, -1]], np.int32))
