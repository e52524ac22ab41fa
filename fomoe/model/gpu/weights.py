"""The dense tensors of a device's layers, placed in its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from fomoe.kernels.gpu.attention import rope_turns
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import Matrix, place
from fomoe.model.attention import AttentionWeights
from fomoe.model.buffers import F32
from fomoe.model.deltanet import DeltaWeights
from fomoe.model.linear import Linear, Weights
from fomoe.model.moe import MoEWeights
from fomoe.model.spec import ModelSpec

Placed = TypeVar("Placed", bound=Any)
ROUTER_PARTS = "post_attention_norm", "ffn_gate_inp"


@dataclass(frozen=True, slots=True)
class AttentionMatrices:
    """`AttentionWeights` on a device; vectors are addresses of float32 values."""

    norm: int
    q: Matrix
    k: Matrix
    v: Matrix
    q_norm: int
    k_norm: int
    output: Matrix

    @property
    def inputs(self) -> tuple[Matrix, ...]:
        """The projections of the layer's input."""
        return self.q, self.k, self.v


@dataclass(frozen=True, slots=True)
class DeltaMatrices:
    """`DeltaWeights` on a device; vectors are addresses of float32 values."""

    norm: int
    qkv: Matrix
    z: Matrix
    alpha: Matrix
    beta: Matrix
    conv: int
    decay: int
    dt_bias: int
    out_norm: int
    output: Matrix

    @property
    def inputs(self) -> tuple[Matrix, ...]:
        """The projections of the layer's input."""
        return self.qkv, self.z, self.alpha, self.beta


@dataclass(frozen=True, slots=True)
class MoEMatrices:
    """`MoEWeights` on a device; the norm is an address of float32 values."""

    norm: int
    router: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    scale: Matrix


@dataclass(frozen=True, slots=True)
class RouterMatrices:
    """What a layer's router needs of the residual stream; the norm as above."""

    norm: int
    router: Matrix


@dataclass(frozen=True, slots=True)
class LayerMatrices:
    """Dense weights of one layer."""

    mixer: AttentionMatrices | DeltaMatrices
    moe: MoEMatrices


@dataclass(frozen=True, slots=True)
class EndMatrices:
    """Embedding, last norm and head; None and 0 where another device has them."""

    embedding: Matrix | None
    norm: int
    head: Matrix | None


def place_layer(gpu: GPU, weights: Weights, spec: ModelSpec, layer: int) -> LayerMatrices:
    """Read a layer's dense tensors and place them; the host keeps none of them."""
    mixer: AttentionMatrices | DeltaMatrices
    if spec.layers[layer] == "attention":
        mixer = _placed(gpu, AttentionWeights.load(weights, spec, layer), AttentionMatrices)
    else:
        mixer = _placed(gpu, DeltaWeights.load(weights, spec, layer), DeltaMatrices)
    return LayerMatrices(mixer, _placed(gpu, MoEWeights.load(weights, spec, layer), MoEMatrices))


def place_routers(
    gpu: GPU, weights: Weights, spec: ModelSpec, layers: Mapping[int, LayerMatrices]
) -> dict[int, RouterMatrices]:
    """Return the router behind each of a device's layers; those of other devices are placed too.

    The first layer's own stands at -1, behind the embedding.
    """
    found = {}
    if 0 in layers:
        found[-1] = RouterMatrices(layers[0].moe.norm, layers[0].moe.router)
    for layer in layers:
        after = layer + 1
        if after in layers:
            moe = layers[after].moe
            found[layer] = RouterMatrices(moe.norm, moe.router)
        elif after < spec.n_layers:
            norm, router = (f"blk.{after}.{part}.weight" for part in ROUTER_PARTS)
            found[layer] = RouterMatrices(
                _vector(gpu, weights.vector(norm, spec.hidden)),
                _matrix(gpu, weights.linear(router, spec.moe.n_experts, spec.hidden)),
            )
    return found


def place_ends(
    gpu: GPU, weights: Weights, spec: ModelSpec, *, embedding: bool, head: bool
) -> EndMatrices:
    """Place the embedding and the head, once where they are one matrix."""
    tied = not weights.has("output.weight")
    shape = spec.vocab, spec.hidden
    first = last = None
    norm = 0
    if embedding:
        first = _matrix(gpu, weights.linear("token_embd.weight", *shape))
    if head:
        norm = _vector(gpu, weights.vector("output_norm.weight", spec.hidden))
        if tied and first is not None:
            last = first
        else:
            name = "token_embd.weight" if tied else "output.weight"
            last = _matrix(gpu, weights.linear(name, *shape))
    return EndMatrices(first, norm, last)


def place_turns(gpu: GPU, spec: ModelSpec) -> int:
    """Return the address of `rope_turns`."""
    turns = rope_turns(spec.attention)
    address = gpu.arena.take(turns.nbytes)
    gpu.upload(address, turns)
    return address


def _placed(gpu: GPU, weights: object, kind: type[Placed]) -> Placed:
    """Return the device's twin `kind` of a layer's weights, field by field."""
    values: dict[str, Matrix | int] = {}
    for field in fields(kind):
        value = getattr(weights, field.name)
        values[field.name] = (
            _matrix(gpu, value) if isinstance(value, Linear) else _vector(gpu, value)
        )
    placed: Placed = kind(**values)
    return placed


def _matrix(gpu: GPU, linear: Linear) -> Matrix:
    return place(gpu, linear.qtype, linear.weight)


def _vector(gpu: GPU, values: F32) -> int:
    """Copy float32 values to the device; returns their address."""
    data = np.ascontiguousarray(values, np.float32)
    address = gpu.arena.take(data.nbytes)
    gpu.upload(address, data)
    return address
