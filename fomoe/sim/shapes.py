"""What the twin must know of a model: bytes and operations, from a file's header or from a name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.gguf.extents import ExpertTable, tensor_name
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.spec import ModelSpec

_F16, _F32 = 2, 4
_ROUTER_BITS = 32
_SHARED = "_shexp"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelShape:
    """Sizes of a model of L layers with E experts each, k per token.

    Attributes:
        expert_bytes: of one expert, float64 [L]; `slot_bytes` with the pages around its parts.
        layer_bytes: dense weights of a layer less the shared expert, float64 [L].
        shared_bytes: the shared expert's weights, float64 [L].
        head_bytes: the output matrix, read once a token.
        kv_bytes: of keys and values per token of context, in all layers.
        state_bytes: of one sequence whatever its length.
        dense_macs, expert_macs: multiply-adds of a prompt's token in all dense matrices but the
            output, and in its k experts.
    """

    name: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden: int
    expert_bytes: npt.NDArray[np.float64]
    slot_bytes: npt.NDArray[np.float64]
    layer_bytes: npt.NDArray[np.float64]
    shared_bytes: npt.NDArray[np.float64]
    head_bytes: float
    kv_bytes: float
    state_bytes: float
    dense_macs: float
    expert_macs: float

    @property
    def dense_bytes(self) -> float:
        """All weights that every token is multiplied with."""
        return float(self.layer_bytes.sum() + self.shared_bytes.sum()) + self.head_bytes

    @property
    def routed_bytes(self) -> float:
        """All routed experts."""
        return float(self.expert_bytes.sum()) * self.n_experts

    @property
    def token_expert_bytes(self) -> float:
        """The routed experts of one token."""
        return float(self.expert_bytes.sum()) * self.top_k


def shape_of_file(path: Path) -> ModelShape:
    """Read a model's sizes from its header; weights are not read.

    Raises:
        GGUFError: the file is malformed or of a kind that is not supported.
    """
    file = open_gguf(path)
    return shape_of(file, read_spec(file))


def shape_of(file: GGUFFile, spec: ModelSpec) -> ModelShape:
    """Return the sizes of an opened model."""
    table = ExpertTable.from_gguf(file, spec.n_layers)
    count = spec.n_layers
    layer, shared = np.zeros(count), np.zeros(count)
    macs = 0.0
    experts = {tensor_name(i, part) for i in range(count) for part in table.part_names}
    for name, info in file.tensors.items():
        number = _layer_number(name)
        if number is None or number >= count or name in experts:
            continue
        target = shared if _SHARED in name and "gate_inp" not in name else layer
        target[number] += info.nbytes
        macs += float(np.prod(info.shape)) if len(info.shape) == 2 else 0.0
    head = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
    moe = spec.moe
    return ModelShape(
        name=spec.name, n_layers=count, n_experts=moe.n_experts, top_k=moe.top_k,
        hidden=spec.hidden, layer_bytes=layer, shared_bytes=shared, head_bytes=float(head.nbytes),
        expert_bytes=np.array([table.expert_bytes(i) for i in range(count)], np.float64),
        slot_bytes=np.array([table.slot_bytes(i) for i in range(count)], np.float64),
        kv_bytes=_kv_bytes(spec), state_bytes=_state_bytes(spec), dense_macs=macs,
        expert_macs=3.0 * count * moe.top_k * spec.hidden * moe.expert_width,
    )  # fmt: skip


def _layer_number(name: str) -> int | None:
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if head == "blk" and number.isdigit() else None


def _kv_bytes(spec: ModelSpec) -> float:
    layers = sum(kind == "attention" for kind in spec.layers)
    return 2.0 * _F16 * layers * spec.attention.n_kv_heads * spec.attention.head_dim


def _state_bytes(spec: ModelSpec) -> float:
    layers = sum(kind == "delta" for kind in spec.layers)
    delta = spec.delta
    one = delta.n_v_heads * delta.key_dim * delta.value_dim + delta.channels * delta.conv_width
    return float(_F32 * layers * one)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """A model without a file: numbers of its config.json, and bits per weight of its quants."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    width: int
    heads: int
    value_heads: int
    expert_bytes: float
    dense_bits: float
    head_bits: float = 6.5625  # Q6_K
    kv_heads: int = 2
    head_dim: int = 256
    key_heads: int = 16
    state_dim: int = 128
    vocab: int = 248_320
    interval: int = 4

    def weights(self) -> npt.NDArray[np.float64]:
        """Return the dense weights of each layer without router and shared expert."""
        attention = self.hidden * self.head_dim * (3 * self.heads + 2 * self.kv_heads)
        inner = self.value_heads * self.state_dim
        channels = 2 * self.key_heads * self.state_dim + inner
        delta = self.hidden * (channels + 2 * inner + 2 * self.value_heads)
        is_attention = (np.arange(self.layers) + 1) % self.interval == 0
        return np.where(is_attention, float(attention), float(delta))


# Shapes: config.json of Qwen/Qwen3.5-35B-A3B, -122B-A10B and -397B-A17B. Experts of the 397B are
# the original's padded 7.25 MiB, those of the 122B its 5.84 MiB (FOMOE, benchmarks-v2-ram-cache);
# the 35B's are Q4_K with half of the down projections in Q6_K. Dense weights of published Q4_K_M
# files of this family are near 8 bits: FOMOE measured 8.8 GB for 8.78 billion of the 397B.
SHAPES = {
    "35b-a3b": _Named(
        layers=40, hidden=2048, experts=256, top_k=8, width=512, heads=16, value_heads=32,
        expert_bytes=1.91e6, dense_bits=8.0,
    ),
    "122b-a10b": _Named(
        layers=48, hidden=3072, experts=256, top_k=8, width=1024, heads=32, value_heads=64,
        expert_bytes=5.84 * 2**20, dense_bits=8.0,
    ),
    "397b-a17b": _Named(
        layers=60, hidden=4096, experts=512, top_k=10, width=1024, heads=32, value_heads=64,
        expert_bytes=7.25 * 2**20, dense_bits=8.0,
    ),
}  # fmt: skip


def shape_by_name(name: str) -> ModelShape:
    """Return the sizes of a model that is known by its shape, as a Q4_K_M file has them.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in SHAPES:
        raise ConfigError(f"shape {name!r} is unknown: take one of {', '.join(SHAPES)}")
    named = SHAPES[name]
    weights = named.weights()
    router = named.experts * named.hidden * _ROUTER_BITS / 8
    shared = 3.0 * named.hidden * named.width
    attention_layers = named.layers // named.interval
    channels = (2 * named.key_heads + named.value_heads) * named.state_dim
    state = named.value_heads * named.state_dim**2 + 4 * channels
    return ModelShape(
        name=name, n_layers=named.layers, n_experts=named.experts, top_k=named.top_k,
        hidden=named.hidden, expert_bytes=np.full(named.layers, named.expert_bytes),
        slot_bytes=np.full(named.layers, named.expert_bytes),
        layer_bytes=weights * named.dense_bits / 8 + router,
        shared_bytes=np.full(named.layers, shared * named.dense_bits / 8),
        head_bytes=named.hidden * named.vocab * named.head_bits / 8,
        kv_bytes=2.0 * _F16 * attention_layers * named.kv_heads * named.head_dim,
        state_bytes=float(_F32 * (named.layers - attention_layers) * state),
        dense_macs=float(weights.sum()) + named.layers * (shared + named.experts * named.hidden),
        expert_macs=3.0 * named.layers * named.top_k * named.hidden * named.width,
    )  # fmt: skip
