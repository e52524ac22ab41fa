"""Calls as such: refused arguments, special values, many callers, instruction sets."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from kernel_cases import floats, weights_of
from kernel_harness import available_isas

from fomoe.kernels import reference
from fomoe.kernels.cpu import ops

F32 = np.float32


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


U64 = zeros(1, dtype=np.uint64)
Q4K = zeros(2, 144, dtype=np.uint8)

REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "unknown type": (lambda: ops.dequantize(9, Q4K, zeros(2, 256)), "weight type 9"),
    "negative type": (lambda: ops.dequantize(-1, Q4K, zeros(2, 256)), "weight type -1"),
    "part of a block": (lambda: ops.dequantize(12, Q4K, zeros(2, 255)), "blocks of 256"),
    "row bytes": (lambda: ops.dequantize(12, Q4K, zeros(2, 512)), "144, must be 288"),
    "rows": (lambda: ops.dequantize(12, Q4K, zeros(3, 256)), "rows of out is 3"),
    "id too large": (lambda: ops.embed(12, Q4K, i32(2), zeros(1, 256)), "id 2 is not below 2"),
    "id negative": (lambda: ops.embed(12, Q4K, i32(-1), zeros(1, 256)), "id -1"),
    "odd activations": (
        lambda: ops.quantize_activations(zeros(1, 33), zeros(1, 33, dtype=np.int8), zeros(1, 1)),
        "multiple of 32",
    ),
    "float weights in int8": (
        lambda: ops.matmul_q8(
            0, zeros(1, 128, dtype=np.uint8), zeros(1, 32, dtype=np.int8), zeros(1, 1), zeros(1, 1)
        ),
        "matmul_f32",
    ),
    "out too small": (
        lambda: ops.matmul_f32(12, Q4K, zeros(1, 256), zeros(1, 1)), "columns of out is 1"
    ),
    "norm weight": (lambda: ops.rms_norm(zeros(1, 8), zeros(7), 1e-6, zeros(1, 8)), "is 7"),
    "part of a head": (
        lambda: ops.gated_rms_norm(zeros(1, 8), zeros(1, 8), zeros(3), 1e-6, zeros(1, 8)),
        "heads of 3",
    ),
    "odd n_rot": (lambda: ops.rope(zeros(1, 1, 8), i32(0), 3, 1e4), "n_rot is 3"),
    "large n_rot": (lambda: ops.rope(zeros(1, 1, 8), i32(0), 10, 1e4), "at most 8"),
    "cache full": (
        lambda: ops.kv_store(*[zeros(2, 1, 8)] * 2, *[zeros(4, 1, 8)] * 2, 3),
        "3 to 5 do not fit a cache of 4",
    ),
    "cache types": (
        lambda: ops.attention(
            zeros(1, 1, 8), zeros(4, 1, 8), zeros(4, 1, 8, dtype=np.float16), 0, zeros(1, 1, 8)
        ),
        "both be float16",
    ),
    "heads": (
        lambda: ops.attention(zeros(1, 3, 8), *[zeros(4, 2, 8)] * 2, 0, zeros(1, 3, 8)),
        "3 heads do not share 2",
    ),
    "negative position": (
        lambda: ops.attention(zeros(1, 2, 8), *[zeros(4, 2, 8)] * 2, -1, zeros(1, 2, 8)), "-1"
    ),
    "pair's token": (
        lambda: ops.experts(
            U64, U64, U64, (12, 12, 12), 256, 256, zeros(1, 256), i32(0, 1), i32(1),
            zeros(1, 256), False,
        ),
        "pair 0 names token 1 of 1",
    ),
    "falling pairs": (
        lambda: ops.experts(
            *[np.zeros(2, np.uint64)] * 3, (12, 12, 12), 256, 256, zeros(1, 256), i32(0, 2, 1),
            i32(0), zeros(1, 256), False,
        ),
        "pair_start falls at expert 1",
    ),
    "pair": (
        lambda: ops.reduce_pairs(zeros(2, 8), i32(2).reshape(1, 1), zeros(1, 1), zeros(1, 8)),
        "order names pair 2 of 2",
    ),
    "threads": (lambda: ops.set_threads(0), "at least 1"),
    "instruction set": (lambda: ops.use_isa("mmx"), "'mmx'"),
    "state rows": (
        lambda: ops.conv_silu(zeros(1, 8), zeros(8, 4), zeros(4, 8), zeros(1, 8)), "is 4, must be 3"
    ),
    "value size": (
        lambda: ops.deltanet(
            zeros(1, 20), zeros(1, 1), zeros(1, 1), zeros(1), zeros(1), 1, 1, 8, 4, 1e-6,
            zeros(1, 8, 4), zeros(1, 4),
        ),
        "multiple of 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "x",
    [zeros(2, 8, dtype=np.float64), zeros(2, 16)[:, ::2], zeros(8), zeros(2, 8).tolist()],
    ids=["dtype", "stride", "rank", "list"],
)
def test_arrays_are_never_converted(x: object) -> None:
    with pytest.raises(TypeError):
        ops.add(x, zeros(2, 8))  # type: ignore[arg-type]


def test_read_only_outputs_are_refused() -> None:
    out = zeros(2, 8)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        ops.add(out, zeros(2, 8))


def test_silu_over_the_whole_range() -> None:
    gate = np.concatenate([np.linspace(-120, 120, 100_001), [0.0, -0.0, 1e-30, 3e38, -3e38]])
    gate = gate.astype(F32).reshape(1, -1)
    out = np.empty_like(gate)
    ops.silu_mul(gate, np.ones_like(gate), out)
    # From -88 on exp(-x) is infinite in float32 and the result 0 instead of -88 / 2e38.
    np.testing.assert_allclose(out, reference.silu(gate), rtol=5e-7, atol=1e-36)


def test_nan_is_not_hidden() -> None:
    gate = np.full((1, 9), np.nan, F32)
    out = np.zeros_like(gate)
    ops.silu_mul(gate, np.ones_like(gate), out)
    assert np.isnan(out).all()


def test_far_gates_leave_a_finite_state() -> None:
    """alpha and beta of +-200: decay and learning rate reach 0 and 1, never NaN."""
    rng, state = np.random.default_rng(1), np.ones((2, 32, 32), F32)
    qkv, out = floats(rng, 4, 2 * 32 + 64), zeros(4, 64)
    alpha = np.array([[200, -200], [-200, 200]] * 2, F32)
    ops.deltanet(qkv, alpha, -alpha, np.full(2, -3, F32), zeros(2), 1, 2, 32, 32, 1e-6, state, out)
    assert np.isfinite(state).all()
    assert np.isfinite(out).all()


def test_norm_may_write_over_its_input() -> None:
    rng = np.random.default_rng(2)
    x, weight = floats(rng, 3, 100), floats(rng, 100)
    out = np.empty_like(x)
    ops.rms_norm(x, weight, 1e-6, out)
    ops.rms_norm(x, weight, 1e-6, x)
    assert np.array_equal(x, out)


def test_callers_at_the_same_time() -> None:
    """Threads of Python share the pool and its size changes under them: the bits stay."""
    rng = np.random.default_rng(3)
    w = weights_of(rng, Kind.Q4_K, 512, 1024)
    x = floats(rng, 4, 1024)
    expected = np.empty((4, 512), F32)
    ops.matmul_f32(12, w, x, expected)
    failures: list[int] = []

    def call(seed: int) -> None:
        out = np.empty_like(expected)
        for i in range(30):
            ops.matmul_f32(12, w, x, out)
            if not np.array_equal(out, expected):
                failures.append(seed)
            if seed == 0:
                ops.set_threads(1 + i % 3)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    ops.set_threads(1)
    assert not failures


def test_the_report_names_the_set_in_use_and_no_problem() -> None:
    assert ops.isa_report() == ops.isa() == available_isas()[-1]


def test_reading_reads_every_byte() -> None:
    for n in (0, 1, 255, 256, 1000, 200_000):
        data = np.zeros(n, np.uint8)
        assert ops.stream_read(data) == 0
        for i in {0, n // 2, n - 1} if n else ():
            data[:] = 0
            data[i] = 9
            assert ops.stream_read(data) == 9


def test_scalar_kernels_exist_everywhere() -> None:
    assert available_isas()[0] == "scalar"
    assert ops.isa() == available_isas()[-1]
