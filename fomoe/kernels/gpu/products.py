"""Launches of products of dense matrices with the vector of one token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import Matrix
from fomoe.kernels.gpu.step import Rows
from fomoe.kernels.gpu.tuning import Kernel, RowShape, Tuning, fit, group_bytes, tuning_of

Part = tuple[Matrix, int]  # W, and where y = W h float32 [rows] goes

NOWHERE = Rows(0, 0, 0)
_SCRATCH_BYTES = 256


@dataclass(frozen=True, slots=True)
class Options:
    """How launches are made.

    Attributes:
        int8: quantised weights take int8 activations, else float32 ones.
        tuning: of the kernel; None is the device's own.
        partial: of a token's experts only those before the first without an address are computed.
    """

    int8: bool = True
    tuning: Tuning | None = None
    partial: bool = False


DEFAULT = Options()


def project(
    gpu: GPU, x: int, norm: int, eps: float, parts: Sequence[Part], *,
    keep: Rows = NOWHERE, options: Options = DEFAULT,
) -> Launch:  # fmt: skip
    """Return y_i = W_i h with h = x * norm / sqrt(mean(x^2) + eps), all in one launch.

    `x` and `norm` are float32 [cols]; matrices have the same columns. Float matrices multiply h,
    quantised ones its int8 form. All forms of h are written to `keep` if it has addresses.

    Raises:
        DeviceError: columns differ, `keep` has some addresses only, or the device is too small.
    """
    if any(keep) and not all(keep):
        raise DeviceError(f"{keep}: h is kept in all forms (x, q and s), or in none")
    plan = _plan(gpu, "project", parts, options)
    args = [x, norm, ctypes.c_float(eps), keep.x, keep.q, keep.s]
    return _launch(gpu, plan, args)


def project_rows(
    gpu: GPU, rows: Rows, matrix: Matrix, x: int, *, add: bool = True,
    options: Options = DEFAULT,
) -> Launch:  # fmt: skip
    """Return x += W h (or x = W h without `add`) for one row h, x float32 [rows of W].

    `rows` needs `x` for float matrices (or without int8), else `q` and `s`.
    """
    plan = _plan(gpu, "project_rows", [(matrix, x)], options, add=add)
    if not (rows.q and rows.s if plan.shapes[0].is_int8 else rows.x):
        raise DeviceError(f"activations for a {plan.shapes[0].qtype.name} matrix are missing")
    return _launch(gpu, plan, list(rows))


class _Part(ctypes.Structure):
    """`struct Part` of project.hip."""

    _fields_ = (
        ("weights", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("rows", ctypes.c_int),
        ("type", ctypes.c_int),
        ("first", ctypes.c_int),
        ("groups", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """A launch but for its vectors."""

    kernel: Kernel
    parts: Sequence[Part]
    shapes: Sequence[RowShape]
    tuning: Tuning
    groups: Sequence[int]  # of each part
    defines: dict[str, int]
    shared_bytes: int


def _plan(
    gpu: GPU, kernel: Kernel, parts: Sequence[Part], options: Options, *, add: bool = False
) -> _Plan:
    cols = {matrix.cols for matrix, _ in parts}
    if len(cols) != 1:
        raise DeviceError(f"matrices of one launch have {sorted(cols)} columns; they must agree")
    most_bytes = max((matrix for matrix, _ in parts), key=lambda m: m.nbytes)
    wanted = options.tuning or tuning_of(gpu.runtime, kernel, most_bytes.type)
    wave = gpu.runtime.wave
    shapes = [RowShape(GGMLType(m.type), m.cols, options.int8) for m, _ in parts]
    stage = max(shape.stage_bytes(wave, wanted.tile) for shape in shapes)
    input_bytes = max(shape.input_bytes for shape in shapes)
    tuning = fit(wanted, gpu.runtime, _SCRATCH_BYTES + input_bytes, stage)
    made = {
        **tuning.defines(stage),
        "FM_ADD": int(add),
        "FM_INT8": int(options.int8),
        "FM_COLS": cols.pop(),
        "FM_PARTS": len(parts),
        "FM_TYPES": sum({1 << shape.qtype for shape in shapes}),
        "FM_INPUT_BYTES": input_bytes,
    }
    most = [
        -(-matrix.rows // shape.rows(wave, tuning.tile))
        for (matrix, _), shape in zip(parts, shapes, strict=True)
    ]
    groups = share_groups(
        [matrix.nbytes for matrix, _ in parts], most, gpu.runtime.cores * tuning.per_core
    )
    shared = _SCRATCH_BYTES + input_bytes + tuning.waves * tuning.stages * stage
    shared = group_bytes(tuning, gpu.runtime, shared)
    return _Plan(kernel, parts, shapes, tuning, groups, made, shared)


def share_groups(nbytes: Sequence[int], most: Sequence[int], groups: int) -> list[int]:
    """Return the groups of each matrix: one at least, `most` at most, else in proportion to bytes.

    The next group always goes to the matrix that has the most bytes for each of its groups.
    """
    given = [1] * len(nbytes)
    for _ in range(groups - len(nbytes)):
        open_parts = [i for i in range(len(nbytes)) if given[i] < most[i]]
        if not open_parts:
            break
        given[max(open_parts, key=lambda i: nbytes[i] / given[i])] += 1
    return given


def _launch(gpu: GPU, plan: _Plan, args: list[object]) -> Launch:
    table, first = (_Part * len(plan.parts))(), 0
    for entry, (matrix, out), groups in zip(table, plan.parts, plan.groups, strict=True):
        entry.weights, entry.out = matrix.address, out
        entry.rows, entry.type = matrix.rows, matrix.type
        entry.first, entry.groups = first, groups
        first += groups
    kernel = gpu.kernel("project", plan.kernel, plan.defines)
    threads = plan.tuning.waves * gpu.runtime.wave
    return Launch(kernel, first, threads, plan.shared_bytes, [*args, table], plan.tuning.early)
