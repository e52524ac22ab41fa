"""What choices lose: native against the formulas, and what must hold for any choice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.sim.losses import losses_of, reference_losses


@st.composite
def choices(draw):
    """Rows of candidates and what runs of them: some dropped, some that are no candidates."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, c = draw(st.integers(0, 5)), draw(st.integers(2, 64))
    k = draw(st.integers(1, min(c, 10)))
    ids = rng.random((n, 100)).argsort(axis=1)[:, :c].astype(np.int32)
    p = -np.sort(-rng.dirichlet(np.full(c + 5, 0.3), n), axis=1)[:, :c].astype(np.float32)
    run = np.empty((n, k), np.int32)
    for row in range(n):
        others = np.setdiff1d(np.arange(100), ids[row, :1])
        run[row] = [ids[row, 0], *rng.permutation(others)[: k - 1]]
        run[row, 1:][rng.random(k - 1) < 0.3] = -1
    return ids, np.maximum(p, 1e-6), run, rng.random((n, k)).astype(np.float32)


@given(choices())
def test_native_equals_the_formulas(choice):
    # Both add a few dozen float64 terms, in different orders.
    np.testing.assert_allclose(losses_of(*choice), reference_losses(*choice), atol=1e-12)


def test_the_exact_choice_loses_nothing():
    ids = np.array([[4, 2, 9, 0]], np.int32)
    p = np.array([[0.5, 0.25, 0.15, 0.1]], np.float32)
    run, weights = ids[:, :2], np.array([[2 / 3, 1 / 3]], np.float32)
    np.testing.assert_allclose(losses_of(ids, p, run.copy(), weights), 0, atol=1e-7)


def test_a_choice_by_hand():
    ids = np.array([[4, 2, 9, 0]], np.int32)
    p = np.array([[0.5, 0.25, 0.125, 0.0625]], np.float32)
    run, weights = np.array([[4, 9]], np.int32), np.array([[0.75, 0.25]], np.float32)
    ((mass, left_out, squares, distance, kl),) = losses_of(ids, p, run, weights)
    assert mass == pytest.approx(1 - 0.625 / 0.75)
    assert left_out == pytest.approx(1 / 3)
    assert squares == pytest.approx(1 / 9)
    assert distance == pytest.approx(1 / 9 + (2 / 3 - 0.75) ** 2 + 0.25**2)
    assert kl == pytest.approx(-np.log(0.625 / 0.75))
