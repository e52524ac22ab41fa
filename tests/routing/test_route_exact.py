"""The exact router against a sort in plain Python and float64 arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError, EngineError
from fomoe.routing import route_exact

VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, 3.25, -7.5, 88.0, -120.0, 1e-40, float("-inf")]
)


@st.composite
def router_rows(draw, max_tokens=4, max_experts=40):
    """Logits [T, E] with many ties, no row of -inf alone, and a k that fits."""
    n_tokens = draw(st.integers(1, max_tokens))
    n_experts = draw(st.integers(1, max_experts))
    logits = np.array(
        draw(st.lists(VALUES, min_size=n_tokens * n_experts, max_size=n_tokens * n_experts)),
        dtype=np.float32,
    ).reshape(n_tokens, n_experts)
    logits[~np.isfinite(logits).any(axis=1), 0] = 0.0
    return logits, draw(st.integers(1, n_experts))


@given(router_rows())
def test_order_and_weights(case):
    logits, k = case
    route = route_exact(logits, k)
    assert route.ids.dtype == np.int32
    assert route.weights.dtype == np.float32
    assert not route.substituted.any()
    for row, ids, weights in zip(logits, route.ids, route.weights, strict=True):
        best = sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k]
        assert ids.tolist() == best
        powers = np.exp(row[best].astype(np.float64) - row.max())
        np.testing.assert_allclose(weights, powers / powers.sum(), rtol=2e-6, atol=1e-37)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([7, 16, 127, 512]))
def test_bits_of_a_token_do_not_depend_on_its_neighbours(seed, n_tokens, n_experts):
    logits = np.random.default_rng(seed).normal(0, 4, (n_tokens, n_experts)).astype(np.float32)
    together = route_exact(logits, 7)
    strided = route_exact(np.asfortranarray(logits), 7)
    np.testing.assert_array_equal(together.weights, strided.weights)
    for token in range(n_tokens):
        alone = route_exact(logits[token : token + 1], 7)
        np.testing.assert_array_equal(alone.ids[0], together.ids[token])
        np.testing.assert_array_equal(alone.weights[0], together.weights[token])


def test_neighbouring_floats_are_told_apart():
    one = np.float32(1)
    row = np.array([[np.nextafter(one, np.float32(0)), one, np.nextafter(one, np.float32(2))]])
    assert route_exact(row, 3).ids.tolist() == [[2, 1, 0]]
    assert route_exact(-row, 3).ids.tolist() == [[0, 1, 2]]


def test_zeros_of_both_signs_are_equal():
    assert route_exact(np.array([[-0.0, 0.0, -0.0]], dtype=np.float32), 3).ids.tolist() == [
        [0, 1, 2]
    ]


def test_input_is_left_alone():
    logits = np.array([[2.0, -1.0, 0.0]], dtype=np.float32)
    kept = logits.copy()
    route_exact(logits, 2)
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(bad):
    logits = np.zeros((3, 4), dtype=np.float32)
    logits[1] = bad
    with pytest.raises(EngineError, match="token 1 of 3"):
        route_exact(logits, 2)


@pytest.mark.parametrize("k", [0, 5])
def test_k_that_does_not_fit_is_refused(k):
    with pytest.raises(ConfigError, match="of 4"):
        route_exact(np.zeros((1, 4), dtype=np.float32), k)
