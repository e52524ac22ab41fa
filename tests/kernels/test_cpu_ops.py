"""Every operation against its float64 twin, and its bits whatever set, threads or grouping."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, repeat

import numpy as np
import pytest
from kernel_cases import CASES
from kernel_harness import Call, Case, available_isas

from fomoe.kernels.cpu import ops

ISAS = available_isas()
ALL = [
    pytest.param(
        case, sizes, id=f"{case.name}-{'-'.join(str(getattr(s, 'name', s)) for s in sizes)}"
    )
    for case in CASES
    for sizes in case.sizes
]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = ops.isa()
    yield
    ops.use_isa(before)
    ops.set_threads(1)


def build(case: Case, sizes: tuple[object, ...]) -> Call:
    return case.make(np.random.default_rng(7), *sizes)


@pytest.mark.parametrize(("case", "sizes"), ALL)
def test_agrees_with_float64_and_keeps_its_bits(case: Case, sizes: tuple[object, ...]) -> None:
    call = build(case, sizes)
    bits = call.run()
    error = call.error()
    assert error <= case.tolerance, f"{error:.2e} > {case.tolerance:.0e} ({case.reason})"
    for isa in ISAS:
        ops.use_isa(isa)
        assert build(case, sizes).run() == bits, f"{isa} differs from {ISAS[-1]}"
    assert build(case, sizes).run_in_parts(repeat(1)) == bits, "token by token differs"
    assert build(case, sizes).run_in_parts(cycle((2, 3, 4))) == bits, "in groups differs"


@pytest.mark.parametrize(("case", "sizes"), [p for p in ALL if p.values[0].name != "embed"])
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(case: Case, sizes: tuple[object, ...], threads: int) -> None:
    bits = build(case, sizes).run()
    ops.set_threads(threads)
    assert build(case, sizes).run() == bits
