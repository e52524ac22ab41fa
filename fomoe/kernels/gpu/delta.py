"""DeltaNet layers on a GPU: one token in one launch, a prompt's tokens in three."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from fomoe.kernels.gpu.arguments import check, pointers, rows_out, starts_of, zeros_at
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.runtime import Runtime
from fomoe.kernels.gpu.state import DeltaPlace, DeltaShape
from fomoe.kernels.gpu.step import Rows

_MOST_THREADS = 256
_CHUNK_THREADS = 256


class DeltaWeights(NamedTuple):
    """Device addresses of float32 tensors: conv [channels, width], ssm_a, dt_bias [n_v], norm [dv].

    `eps` belongs to the norms.
    """

    conv: int
    ssm_a: int
    dt_bias: int
    norm: int
    eps: float


class DeltaInputs(NamedTuple):
    """Addresses of float32 projections.

    qkv [T, channels], z [T, n_v * dv], alpha and beta [T, n_v].
    """

    qkv: int
    z: int
    alpha: int
    beta: int


class DeltaCall(NamedTuple):
    """What a layer computes with: weights, inputs, its place in the state, and where rows go."""

    weights: DeltaWeights
    inputs: DeltaInputs
    place: DeltaPlace
    out: Rows


def head_parts(spec: DeltaShape, runtime: Runtime) -> int:
    """Return the groups that share a head in decode on a device.

    Parts of a head wait for each other in the end, which takes longer than a head on one core:
    there is one part while a quarter of the cores have something to do.
    """
    parts = 1
    while 8 * parts * spec.n_v_heads <= runtime.cores and spec.value_dim % (8 * parts) == 0:
        parts *= 2
    return parts


def delta(
    gpu: GPU, step: int, spec: DeltaShape, call: DeltaCall, parts: int | None = None
) -> Launch:
    """Return the launch of one token: convolution, delta rule, gated norm, rows [n_v * dv].

    `step` is the address of the step block; `parts` groups share a head (None: `head_parts`).

    Raises:
        DeviceError: sizes that the kernel does not take.
    """
    _check(spec)
    parts = parts or head_parts(spec, gpu.runtime)
    check(
        (
            spec.value_dim % (4 * parts) == 0,
            f"{spec.value_dim} values per head in {parts} parts: parts are multiples of 4",
        )
    )
    threads = _threads(spec, spec.value_dim // parts)
    defines = {**_sizes(spec), "PARTS": parts, "THREADS": threads}
    function = gpu.kernel("delta", "delta", defines)
    outputs = gpu.arena.take(4 * spec.n_v_heads * spec.value_dim) if parts > 1 else 0
    finished = zeros_at(gpu, 4 * spec.n_v_heads) if parts > 1 else 0
    args = [
        step,
        *_places(call.place),
        pointers(*call.weights[:4]),
        pointers(*call.inputs),
        ctypes.c_float(call.weights.eps),
        pointers(outputs, finished),
        rows_out(call.out, spec.value_dim),
    ]
    return Launch(function, (parts, spec.n_v_heads), threads, 0, args, early=True)


def delta_scratch_bytes(spec: DeltaShape, tokens: int) -> int:
    """Return the bytes that `delta_chunk` needs between its launches for up to `tokens` tokens."""
    return _middle(spec, tokens)[-1]


def delta_chunk(
    gpu: GPU, step: int, spec: DeltaShape, call: DeltaCall, chunk: tuple[int, int]
) -> list[Launch]:
    """Return the launches for the step block's T tokens; the bits are those of T calls of `delta`.

    `chunk` is the largest T and the address of `delta_scratch_bytes` bytes.

    Raises:
        DeviceError: sizes that the kernels do not take.
    """
    _check(spec)
    tokens, scratch = chunk
    threads, few = _CHUNK_THREADS, _CHUNK_THREADS // 2
    units = few // 32
    defines = {**_sizes(spec), "THREADS": threads}
    names = ("delta_inputs", "delta_scan", "delta_finish")
    inputs, scan, finish = (gpu.kernel("delta_chunk", name, defines) for name in names)
    weights, eps = pointers(*call.weights[:4]), ctypes.c_float(call.weights.eps)
    starts = [scratch + offset for offset in _middle(spec, tokens)]
    middle, values = pointers(*starts[:3]), starts[1]
    ring, memory = _places(call.place)
    parts = -(-spec.value_dim // (threads // _lanes(spec)))
    out = rows_out(call.out, spec.value_dim)
    return [
        Launch(inputs, -(-tokens * spec.n_k_heads // units), few, 0,
               [step, ring, weights, pointers(*call.inputs), eps, middle]),
        Launch(scan, (parts, spec.n_v_heads), threads, 0,
               [step, ring, memory, call.inputs.qkv, middle]),
        Launch(finish, -(-tokens * spec.n_v_heads // units), few, 0,
               [step, weights, call.inputs.z, eps, values, out]),
    ]  # fmt: skip


def _middle(spec: DeltaShape, tokens: int) -> list[int]:
    """Offsets of keys and queries, values, gates; their end."""
    keys = 4 * tokens * spec.n_k_heads * 2 * spec.key_dim
    values = 4 * tokens * spec.n_v_heads * spec.value_dim
    return starts_of([keys, values, 16 * tokens * spec.n_v_heads])


def _check(spec: DeltaShape) -> None:
    check(
        (
            spec.n_v_heads % spec.n_k_heads == 0,
            f"{spec.n_v_heads} value heads on {spec.n_k_heads} key heads: not a multiple",
        ),
        (
            spec.key_dim % 4 == 0 and spec.value_dim % 4 == 0,
            f"heads of {spec.key_dim} and {spec.value_dim} values: not multiples of 4",
        ),
    )


def _sizes(spec: DeltaShape) -> dict[str, int]:
    return {
        "N_K": spec.n_k_heads,
        "N_V": spec.n_v_heads,
        "DK": spec.key_dim,
        "DV": spec.value_dim,
        "CONV": spec.conv_width,
    }


def _lanes(spec: DeltaShape) -> int:
    """Lanes that share a column of a memory, as delta.h has it."""
    return next(lanes for lanes in (8, 4, 2, 1) if spec.key_dim // 4 % lanes == 0)


def _threads(spec: DeltaShape, columns: int) -> int:
    """A column per kLanes threads where they suffice, and two waves of 64 at least."""
    wanted = -(-columns * _lanes(spec) // 64) * 64
    return max(128, min(_MOST_THREADS, wanted))


def _places(place: DeltaPlace) -> tuple[int, int]:
    return place.ring, place.memory
