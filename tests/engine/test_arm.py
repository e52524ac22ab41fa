"""How many experts stay in RAM: as few as make a step as short as it can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.engine.arm import ArmCosts, arm_table, arm_text, step_s

seconds = st.floats(1e-6, 1e-2)


@given(copy=seconds, gpu=seconds, cpu=seconds, top_k=st.integers(1, 12))
def test_no_other_split_is_shorter(copy, gpu, cpu, top_k):
    costs = ArmCosts(copy, gpu, cpu)
    table = arm_table(costs, top_k)
    assert len(table) == top_k + 1
    for n, stay in enumerate(table):
        times = [step_s(costs, n - m, m) for m in range(n + 1)]
        assert times[stay] == min(times)
        assert all(time > times[stay] for time in times[:stay])


def test_the_desktop_of_reference():
    """A copy takes 0.27 ms, the processor 0.115 ms, the GPU 0.03 ms."""
    table = arm_table(ArmCosts(270e-6, 30e-6, 115e-6), 10)
    assert table == (0, 1, 2, 2, 3, 4, 4, 5, 6, 7, 7)
    assert arm_text(table) == "0 1 2 2 3 4 4 5 6 7 7"


def test_a_slow_processor_has_nothing_to_do():
    table = arm_table(ArmCosts(1e-4, 1e-5, 1.0), 8)
    assert not any(table)
    assert arm_text(table) == "off"


@pytest.mark.parametrize(("copied", "stay", "expected"), [(0, 0, 0.0), (3, 0, 31.0), (2, 4, 28.0)])
def test_the_time_of_a_step(copied, stay, expected):
    assert step_s(ArmCosts(10.0, 1.0, 7.0), copied, stay) == expected
