"""The layout of a step: both ends see the same arrays, and no two of them touch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.actors.layout import StepArena
from fomoe.engine.transfers import ENTRY

NAMES = ("x", "out", "order", "weights", "pair_token", "pair_start", "entries")
SHAPES = [(1, 1, 1, 1), (7, 96, 3, 5), (128, 256, 4, 32), (16, 64, 8, 8)]


def arrays_of(layout):
    arena = np.zeros(layout.nbytes, np.uint8)
    return arena, layout.views(arena)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 12), st.integers(12, 64))
def test_arrays_are_aligned_and_apart(max_tokens, hidden, top_k, n_experts):
    layout = StepArena(max_tokens, hidden, top_k, n_experts)
    arena, views = arrays_of(layout)
    base, spans = arena.ctypes.data, []
    for view in views:
        assert set(view.offsets) == set(NAMES)
        for name in NAMES:
            array = getattr(view, name)
            start = array.ctypes.data - base
            assert start == view.offsets[name]
            assert start % 64 == 0
            assert array.flags.c_contiguous
            spans.append((start, start + array.nbytes))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert spans[0][0] >= 0
    assert spans[-1][1] <= layout.nbytes


@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_hold_the_largest_step(shape):
    max_tokens, hidden, top_k, n_experts = shape
    _, views = arrays_of(StepArena(*shape))
    assert len(views) == StepArena.BUFFERS
    pairs = max_tokens * top_k
    for view in views:
        assert view.x.shape == view.out.shape == (max_tokens, hidden)
        assert view.order.shape == view.weights.shape == (max_tokens, top_k)
        assert view.pair_token.shape == (pairs,)
        assert view.entries.shape == (min(pairs, n_experts),)
        assert view.pair_start.shape == (min(pairs, n_experts) + 1,)
        assert view.x.dtype == view.out.dtype == view.weights.dtype == np.float32
        assert view.order.dtype == view.pair_token.dtype == view.pair_start.dtype == np.int32
        assert view.entries.dtype == ENTRY


@pytest.mark.parametrize("shape", SHAPES)
def test_writing_one_array_changes_no_other(shape):
    _, views = arrays_of(StepArena(*shape))
    all_arrays = [getattr(view, name) for view in views for name in NAMES]
    for number, array in enumerate(all_arrays):
        array.view(np.uint8).fill(number + 1)
    for number, array in enumerate(all_arrays):
        assert (array.view(np.uint8) == number + 1).all()


def test_both_ends_agree():
    arena = np.zeros(StepArena(5, 32, 2, 8).nbytes, np.uint8)
    driver, device = StepArena(5, 32, 2, 8).views(arena), StepArena(5, 32, 2, 8).views(arena)
    driver[1].x[:] = np.arange(160).reshape(5, 32)
    driver[1].entries["address"] = 2**40
    assert np.array_equal(device[1].x, driver[1].x)
    assert (device[1].entries["address"] == 2**40).all()
    assert not device[0].x.any()
    assert device[0].offsets == driver[0].offsets
