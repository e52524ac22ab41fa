from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.routing.nulls import round_to_bf16, touched_sites


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


def test_a_share_of_sites_is_touched_at_every_rank() -> None:
    logits = np.random.default_rng(2).standard_normal((2000, 32)).astype(np.float32)
    touched = touched_sites(logits, 8, 0.25)
    # 16,000 sites, s.d. 0.0034; by rank 2,000, s.d. 0.0097.
    assert touched.mean() == pytest.approx(0.25, abs=0.015)
    assert touched.mean(axis=0) == pytest.approx(np.full(8, 0.25), abs=0.04)
    assert not touched_sites(logits, 8, 0.0).any()
    assert touched_sites(logits, 8, 1.0).all()


def test_sites_are_a_function_of_the_row_and_the_seed() -> None:
    logits = np.random.default_rng(4).standard_normal((500, 16)).astype(np.float32)
    whole = touched_sites(logits, 4, 0.5, seed=1)
    np.testing.assert_array_equal(whole[20:30], touched_sites(logits[20:30], 4, 0.5, seed=1))
    assert (whole != touched_sites(logits, 4, 0.5, seed=2)).mean() == pytest.approx(0.5, abs=0.06)
    changed = logits.copy()
    changed[:, 3] = np.nextafter(changed[:, 3], np.float32(9))
    assert (whole != touched_sites(changed, 4, 0.5, seed=1)).mean() == pytest.approx(0.5, abs=0.06)
