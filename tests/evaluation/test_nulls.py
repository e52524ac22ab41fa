from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError
from fomoe.evaluation.nulls import NullRouting, matched_sites, round_to_bf16
from fomoe.routing import route_exact


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1))
def test_bf16_is_the_nearest_number_of_eight_bits(values: list[float]) -> None:
    x = np.array(values, np.float32)
    rounded = round_to_bf16(x)
    bits = rounded.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    step = np.uint32(1 << 16)
    for neighbour in (bits + step, bits - step):
        other = neighbour.view(np.float32).astype(np.float64)
        gap, best = abs(other - x), abs(rounded.astype(np.float64) - x)
        assert (np.isnan(gap) | (best <= gap)).all()
        even = ((bits >> 16) & 1) == 0
        assert (np.isnan(gap) | (best < gap) | even).all()


def test_as_many_sites_as_asked_wherever_they_fall() -> None:
    counts = np.random.default_rng(1).integers(0, 9, (200, 12))
    mask = matched_sites(counts, 8, seed=3)
    assert (mask.sum(axis=-1) == counts).all()
    share = mask.reshape(-1, 8).mean(axis=0)
    assert np.ptp(share) < 0.05  # no rank is preferred: 2,400 rows, s.d. 0.01
    with pytest.raises(ConfigError, match="of 8 sites"):
        matched_sites(np.array([9]), 8, seed=0)


def test_the_null_runs_the_exact_experts_and_rounds_a_share_of_weights() -> None:
    logits = np.random.default_rng(2).standard_normal((2000, 32)).astype(np.float32)
    nothing = np.zeros(logits.shape, np.bool_)
    exact = route_exact(logits, 8)
    route = NullRouting(0.25).route(logits, 8, nothing)
    np.testing.assert_array_equal(route.ids, exact.ids)
    touched = route.substituted
    np.testing.assert_array_equal(route.weights[~touched], exact.weights[~touched])
    np.testing.assert_array_equal(route.weights[touched], round_to_bf16(exact.weights[touched]))
    assert (route.weights[touched] != exact.weights[touched]).mean() > 0.9
    # 16,000 sites, s.d. 0.0034 each way; by rank 2,000, s.d. 0.0097.
    assert touched.mean() == pytest.approx(0.25, abs=0.015)
    assert touched.mean(axis=0) == pytest.approx(np.full(8, 0.25), abs=0.04)


def test_the_null_is_a_function_of_the_row_and_the_seed() -> None:
    logits = np.random.default_rng(4).standard_normal((50, 16)).astype(np.float32)
    resident = np.ones(logits.shape, np.bool_)
    whole = NullRouting(0.5, seed=1).route(logits, 4, resident).substituted
    part = NullRouting(0.5, seed=1).route(logits[20:30], 4, ~resident[20:30]).substituted
    np.testing.assert_array_equal(whole[20:30], part)
    other = NullRouting(0.5, seed=2).route(logits, 4, resident).substituted
    assert (whole != other).mean() == pytest.approx(0.5, abs=0.15)
    assert not NullRouting(0.0).route(logits, 4, resident).substituted.any()
    assert NullRouting(1.0).route(logits, 4, resident).substituted.all()
    with pytest.raises(ConfigError, match="from 0 to 1"):
        NullRouting(1.1)
