"""Device memory that the launches of a pass leave to each other; one set for all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.arena import aligned
from fomoe.kernels.gpu.attention import attend_scratch_bytes
from fomoe.kernels.gpu.delta import delta_scratch_bytes
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.moe import MoEBuffers
from fomoe.kernels.gpu.step import Rows
from fomoe.model.gpu.options import HostOptions
from fomoe.model.layers import HEAD_ROWS
from fomoe.model.spec import ModelSpec

_F32 = 4
_BLOCK = 32

Sizes = dict[str, int]

# What only one half of a layer works with.
_OF_EXPERTS = ("inner", "late", "pair_", "weights")
_OF_DENSE = ("inputs", "mixed", "gate", "up", "scale", "scratch", "shared_", "head_", "logits")


@dataclass(frozen=True, slots=True)
class Work:
    """Addresses, T rows each where not said otherwise.

    Attributes:
        x: the residual stream float32 [T, D].
        inputs: outputs of the mixers' projections, float32; `starts` of `delta_parts` or
            `attention_parts` says where each begins.
        mixed: what a mixer gives to its output projection.
        moe: a token's way through a MoE layer; `h` and `scores` have T rows.
        scratch: between the launches of a mixer over a prompt.
        shared_hidden, shared_out: the shared expert over a prompt.
        pair_hidden, pair_out: rows of (token, expert) pairs, T * K of them.
        weights: float32 [T, K].
        sums: of routed experts that another process computes, float32 [T, D].
        head_x: float32 [HEAD_ROWS, D], rows that the head is asked for; `head_h` normed.
        logits: float32 [HEAD_ROWS, V]; 0 as `head_x` without a head.
    """

    x: int
    inputs: int
    mixed: Rows
    moe: MoEBuffers
    scratch: int
    shared_hidden: Rows
    shared_out: int
    pair_hidden: Rows
    pair_out: int
    weights: int
    sums: int
    head_x: int
    head_h: Rows
    logits: int

    @classmethod
    def take(cls, gpu: GPU, spec: ModelSpec, options: HostOptions) -> Work:
        """Take the memory from the arena."""
        at = {name: gpu.arena.take(n) if n else 0 for name, n in sizes(spec, options).items()}
        moe = MoEBuffers(
            _rows(at, "h"), at["scores"], at["gate"], at["up"], at["scale"], at["inner"], at["late"]
        )
        return cls(
            x=at["x"],
            inputs=at["inputs"],
            mixed=_rows(at, "mixed"),
            moe=moe,
            scratch=at["scratch"],
            shared_hidden=_rows(at, "shared_hidden"),
            shared_out=at["shared_out"],
            pair_hidden=_rows(at, "pair_hidden"),
            pair_out=at["pair_out"],
            weights=at["weights"],
            sums=at["sums"],
            head_x=at["head_x"],
            head_h=_rows(at, "head_h"),
            logits=at["logits"],
        )


def work_bytes(spec: ModelSpec, options: HostOptions) -> int:
    """Return the bytes that `Work.take` takes from an arena."""
    return sum(aligned(n) for n in sizes(spec, options).values())


def sizes(spec: ModelSpec, options: HostOptions) -> Sizes:
    """Return the bytes of each part by name; 0 for what prompts alone want, or the other half."""
    tokens, moe = options.max_tokens, spec.moe
    width = max(spec.delta.inner, spec.attention.n_heads * spec.attention.head_dim)
    inputs = max(_end(delta_parts(spec), tokens), _end(attention_parts(spec), tokens))
    head = HEAD_ROWS if options.head else 0
    prompt = tokens if tokens > 1 else 0
    scratch = max(
        delta_scratch_bytes(spec.delta, prompt), attend_scratch_bytes(spec.attention, prompt)
    )
    found = {
        "x": _F32 * tokens * spec.hidden,
        "inputs": inputs,
        "scores": _F32 * tokens * moe.n_experts,
        "gate": _F32 * moe.shared_width,
        "up": _F32 * moe.shared_width,
        "scale": _F32 * tokens,
        "inner": _F32 * moe.top_k * moe.expert_width,
        "late": 4,
        "scratch": scratch if prompt else 0,
        "shared_out": _F32 * prompt * spec.hidden,
        "pair_out": _F32 * prompt * moe.top_k * spec.hidden,
        "weights": _F32 * prompt * moe.top_k,
        "sums": _F32 * tokens * spec.hidden if options.part == "dense" else 0,
        "head_x": _F32 * head * spec.hidden,
        "logits": _F32 * head * spec.vocab,
        **_row_sizes("h", tokens, spec.hidden),
        **_row_sizes("mixed", tokens, width),
        **_row_sizes("shared_hidden", prompt, moe.shared_width),
        **_row_sizes("pair_hidden", prompt * moe.top_k, moe.expert_width),
        **_row_sizes("head_h", head, spec.hidden),
    }
    absent: tuple[str, ...] = {"all": (), "dense": _OF_EXPERTS, "experts": _OF_DENSE}[options.part]
    return {name: 0 if name.startswith(absent) else nbytes for name, nbytes in found.items()}


def delta_parts(spec: ModelSpec) -> tuple[int, ...]:
    """Return the widths of qkv, z, alpha and beta."""
    delta = spec.delta
    return delta.channels, delta.inner, delta.n_v_heads, delta.n_v_heads


def attention_parts(spec: ModelSpec) -> tuple[int, ...]:
    """Return the widths of query with gate, key and value."""
    a = spec.attention
    kv = a.n_kv_heads * a.head_dim
    return 2 * a.n_heads * a.head_dim, kv, kv


def starts(address: int, widths: Sequence[int], tokens: int) -> list[int]:
    """Return where float32 [tokens, width] of each width begins, one behind the other."""
    at, found = address, []
    for width in widths:
        found.append(at)
        at += aligned(_F32 * tokens * width)
    return found


def form(rows: Rows, qtype: int, *, int8: bool) -> Rows:
    """Return the one form of rows that a matrix of a type is multiplied with."""
    if int8 and not GGMLType(qtype).is_float:
        return Rows(0, rows.q, rows.s)
    return Rows(rows.x, 0, 0)


def _end(widths: Sequence[int], tokens: int) -> int:
    return sum(aligned(_F32 * tokens * width) for width in widths)


def _row_sizes(name: str, tokens: int, width: int) -> Sizes:
    count = tokens * width
    return {f"{name}.x": _F32 * count, f"{name}.q": count, f"{name}.s": 8 * count // _BLOCK}


def _rows(at: Mapping[str, int], name: str) -> Rows:
    return Rows(at[f"{name}.x"], at[f"{name}.q"], at[f"{name}.s"])
