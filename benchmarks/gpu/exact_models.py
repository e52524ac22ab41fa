"""Logits of small models on a device, against the float64 reference and the CPU's path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cpu_path import F32, CPUPath
from reference.qwen35moe_f64 import Model, Result, forward, relative_l2
from support.hosted_gpu import decode_logits, prefill_logits
from support.tiny_gguf import write_tiny

from fomoe.engine.gpu_local import resident_model
from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType
from fomoe.gguf.reader import open_gguf
from fomoe.model.gpu.host import GPUModel

VECTORS = Path(__file__).parents[2] / "tests" / "vectors"
CHUNKS = 1, 37, 64, 512
# Of tests/model/test_golden.py, for the same reasons.
BOUND = {"f32": 1e-4, "f16": 5e-3}
NEAR_TIE = 1e-4
LEAST_BEFORE_TIE = 0.75
LEAST_EXACT_PAIRS = 0.5
# Over long texts int8 activations part at the edges of steps; both must be as far from the truth.
MOST_INT8_RATIO = 1.25
_DRAWS = 8
_REFUSED = re.compile("GPUs (have kernels|multiply rows)")

_SMALL: dict[str, Any] = {
    "layers": 2, "attention_interval": 2, "experts": 5, "top_k": 2, "value_heads": 8, "vocab": 300,
}  # fmt: skip
_TRUE_HEADS: dict[str, Any] = {
    "head_dim": 256, "rotary": 64, "kv_heads": 1, "state_dim": 128, "dense": "Q8_0",
}  # fmt: skip
TYPES = "F16", "BF16", "Q8_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"
SHAPES: dict[str, dict[str, Any]] = {
    **{f"all {kind}": {**_SMALL, "quant": kind, "dense": kind} for kind in TYPES},
    "split, 32 experts": {"quant": "Q4_K_M", "shard_tensors": 20, "mtp": True},
    "fused, tied": {**_SMALL, "quant": "Q5_K", "fused": True, "tied": True},
    "true heads": {**_SMALL, **_TRUE_HEADS, "quant": "Q4_K_M", "value_heads": 4},
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a figure of a model in one way of computing, and its bound.

    `positions` counts those that were compared.
    """

    model: str
    mode: str
    way: str
    figure: str
    value: float
    bound: float
    positions: int
    passed: bool


@dataclass(frozen=True)
class Case:
    """A model and how much of it is to be looked at; `shape` is None for a golden vector."""

    name: str
    device: str
    positions: int
    chunks: tuple[int, ...]
    shape: dict[str, Any] | None = None


Logits = Callable[[list[int]], F32]


def cases(device: str, *, tiny: bool) -> list[Case]:
    """Return every golden vector and every shape; of both a few, and shorter, where `tiny`."""
    golden = sorted(path.stem for path in VECTORS.glob("*.gguf"))
    built = list(SHAPES)
    if tiny:
        golden, built = ["f16_untied", "f32_tied", "wide_q4_k_m"], ["all IQ4_XS"]
    positions, chunks = (12, (1, 5, 12)) if tiny else (512, CHUNKS)
    return [
        *(Case(name, device, positions, chunks) for name in golden),
        *(Case(name, device, positions, chunks, SHAPES[name]) for name in built),
    ]


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Return name, rows as dicts, and why the device refuses the model, where it does.

    Raises:
        DeviceError: the device fails in any other way.
    """
    path = VECTORS / f"{case.name}.gguf"
    if case.shape is not None:
        path = write_tiny(folder / f"{case.name.replace(' ', '_')}.gguf", seed=7, **case.shape)
    rows: list[Row] = []
    refused = ""
    try:
        for kv in ("f32", "f16"):
            rows += _float_rows(case, path, kv)
            if _has_blocks(path):
                rows += _int8_rows(case, path, kv)
    except DeviceError as error:
        refused = str(error)
        if rows or not _REFUSED.search(refused):
            raise
    return {"model": case.name, "rows": [asdict(row) for row in rows], "refused": refused}


def _has_blocks(path: Path) -> bool:
    """Whether anything is multiplied with int8 activations."""
    return any(not GGMLType(t.type).is_float for t in open_gguf(path).tensors.values())


@contextmanager
def _ways(case: Case, path: Path, *, kv: str, int8: bool) -> Iterator[dict[str, Logits]]:
    """Yield what computes logits [T, V] of a text: token by token, in chunks, on the CPU."""
    longest = max(case.chunks)
    with resident_model(
        path, case.device, ctx_size=case.positions, max_tokens=longest, int8=int8, kv_dtype=kv
    ) as model:
        ways: dict[str, Logits] = {"decode": lambda tokens: _afresh(model, decode_logits, tokens)}
        for chunk in case.chunks:
            ways[f"prompt by {chunk}"] = lambda tokens, n=chunk: _afresh(  # type: ignore[misc]
                model, prefill_logits, tokens, n
            )
        yield ways


def _afresh(model: GPUModel, compute: Callable[..., F32], tokens: list[int], *more: int) -> F32:
    model.reset(0)
    return compute(model, tokens, *more)


def _float_rows(case: Case, path: Path, kv: str) -> list[Row]:
    """Float32 activations: the reference with the same cache, and the stored logits."""
    reference = Model(path)
    tokens, result, end = _draw(path, reference, case.positions, kv)
    stored = np.load(path.with_suffix(".npz")) if case.shape is None else None
    cpu = CPUPath(path, ctx_size=case.positions, int8=False, kv_dtype=kv)
    mode, rows = f"float, KV {kv}", []
    with _ways(case, path, kv=kv, int8=False) as ways:
        for way, compute in {**ways, "CPU": cpu.logits}.items():
            error = float(relative_l2(compute(tokens)[:end], result.logits[:end]).max())
            passed = error <= BOUND["f32"] and end >= LEAST_BEFORE_TIE * len(tokens)
            rows.append(Row(case.name, mode, way, "of reference", error, BOUND["f32"], end, passed))
            if stored is not None:
                count = min(case.positions, len(stored["tokens"]))
                found = compute(stored["tokens"][:count].tolist())
                error = float(relative_l2(found, stored["logits"][:count]).max())
                rows.append(
                    Row(case.name, mode, way, "of stored", error, BOUND[kv], count,
                        error <= BOUND[kv])
                )  # fmt: skip
    return rows


def _draw(path: Path, reference: Model, positions: int, kv: str) -> tuple[list[int], Result, int]:
    """Return tokens, their result and the position of the first near tie of the routing.

    A different expert there changes all that follows, which is not compared. A token whose routing
    is a near tie is drawn again, some times.
    """
    vocab, rng = len(reference.weight("token_embd.weight")), np.random.default_rng(0)
    tokens = rng.integers(0, vocab, positions).tolist()
    for left in reversed(range(_DRAWS)):
        result = forward(path, tokens, kv=kv)
        tie = result.routing_margin(reference.top_k) < NEAR_TIE
        if not tie.any():
            return tokens, result, positions
        if left:
            tokens[int(np.argmax(tie))] = int(rng.integers(vocab))
    return tokens, result, int(np.argmax(tie))


def _int8_rows(case: Case, path: Path, kv: str) -> list[Row]:
    """Int8 activations: texts of two tokens as the CPU's, and a long one as far from the truth.

    A value on the edge of two steps falls on either side, and moves all that comes after it.
    """
    vocab, mode = len(Model(path).weight("token_embd.weight")), f"int8, KV {kv}"
    tokens = np.random.default_rng(0).integers(0, vocab, case.positions).tolist()
    truth = forward(path, tokens, kv=kv).logits
    cpu = CPUPath(path, ctx_size=case.positions, int8=True, kv_dtype=kv)
    cpu_error = float(np.median(relative_l2(cpu.logits(tokens), truth)))
    rows = []
    with _ways(case, path, kv=kv, int8=True) as ways:
        for way, compute in ways.items():
            error = float(np.median(relative_l2(compute(tokens), truth)))
            passed = error <= max(BOUND["f32"], MOST_INT8_RATIO * cpu_error)
            rows.append(
                Row(case.name, mode, way, "error over CPU's", error / cpu_error, MOST_INT8_RATIO,
                    len(tokens), passed)
            )  # fmt: skip
        if kv == "f32":  # as the CPU's test has it
            rows += _pair_rows(case, mode, cpu, ways, np.array(tokens).reshape(-1, 2).tolist())
    return rows


def _pair_rows(
    case: Case, mode: str, cpu: CPUPath, ways: dict[str, Logits], pairs: list[list[int]]
) -> list[Row]:
    """Which share of texts of two tokens comes out as on the CPU."""
    expected, rows = [cpu.logits(pair) for pair in pairs], []
    for way in ("decode", f"prompt by {case.chunks[-1]}"):
        share = _exact_pairs(ways[way], pairs, expected) / len(pairs)
        rows.append(
            Row(case.name, mode, way, "pairs as CPU", share, LEAST_EXACT_PAIRS, 2 * len(pairs),
                share >= LEAST_EXACT_PAIRS)
        )  # fmt: skip
    return rows


def _exact_pairs(compute: Logits, pairs: Sequence[list[int]], expected: Sequence[F32]) -> int:
    return sum(
        bool(relative_l2(compute(pair), logits).max() <= BOUND["f32"])
        for pair, logits in zip(pairs, expected, strict=True)
    )
