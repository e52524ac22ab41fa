"""The native reduction of router rows against its definition, to the bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fomoe.errors import EngineError
from fomoe.traces import MOST_CANDIDATES, RouterRows, RowCutter, cut_rows, reference

SCORES = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1.0, float("-inf")])


def rows_of(n_experts):
    return arrays(np.float32, (3, n_experts), elements=SCORES).filter(
        lambda rows: np.isfinite(rows).any(axis=1).all()
    )


@given(st.sampled_from([1, 2, 15, 16, 33, 64, 65, 130]).flatmap(rows_of))
def test_it_equals_its_definition(scores):
    rows = cut_rows(scores[None])
    ids, probabilities, tail = reference.reduce(scores, min(MOST_CANDIDATES, scores.shape[1]))
    np.testing.assert_array_equal(rows.ids[0], ids)
    assert rows.probabilities[0].tobytes() == probabilities.tobytes()
    assert rows.tail[0].tobytes() == tail.tobytes()


def test_a_cutter_writes_its_rows_and_no_others():
    scores = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    rows = RouterRows.empty(3, 4, 64)
    for part in (rows.ids, rows.probabilities, rows.tail):
        part[:] = 7
    RowCutter(512, rows).cut(1, scores)
    alone = cut_rows(scores[None])
    np.testing.assert_array_equal(rows.ids[1, :2], alone.ids[0])
    np.testing.assert_array_equal(rows.tail[1, :2], alone.tail[0])
    total = rows.probabilities[1, :2].sum(axis=1) + rows.tail[1, :2]
    np.testing.assert_allclose(total, 1, rtol=1e-5)  # 512 roundings of float32
    for part in (rows.ids, rows.probabilities, rows.tail):
        assert (part[[0, 2]] == 7).all()
        assert (part[1, 2:] == 7).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_row_is_refused(value):
    scores = np.zeros((1, 3, 20), np.float32)
    scores[0, 1, 5] = value
    with pytest.raises(EngineError, match="token 1 of 3"):
        cut_rows(scores)


@pytest.mark.parametrize(
    ("layer", "shape", "error"),
    [(3, (1, 20), IndexError), (-1, (1, 20), IndexError), (0, (5, 20), IndexError),
     (0, (1, 21), ValueError)],
)  # fmt: skip
def test_what_does_not_fit_is_refused(layer, shape, error):
    cutter = RowCutter(20, RouterRows.empty(3, 4, 20))
    with pytest.raises(error):
        cutter.cut(layer, np.zeros(shape, np.float32))
