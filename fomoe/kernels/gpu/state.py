"""Where a sequence's state lies in device memory: one block per sequence, the same for every pass.

Offsets are bytes from the step block's `state`. Recurrent layers come first, so that what must be
zero before the first token is one range:

    DeltaNet   ring    float32 [conv_width, channels]: inputs of the convolution, that of position p
                       in row p mod conv_width
               memory  float32 [n_v_heads, value_dim, key_dim]
    attention  keys    [ctx, n_kv_heads, head_dim], float16 or float32
               values  [ctx / 32, n_kv_heads, head_dim, 32]: 32 positions side by side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.arena import aligned

TILE = 32  # positions of a block of values
_KV_BYTES = {"f16": 2, "f32": 4}


class DeltaShape(Protocol):
    """Sizes of DeltaNet layers; fomoe.model.spec.DeltaSpec is one."""

    @property
    def n_k_heads(self) -> int:
        """Heads of queries and keys."""

    @property
    def n_v_heads(self) -> int:
        """Heads of values, each with a memory; head r uses key head r mod n_k_heads."""

    @property
    def key_dim(self) -> int:
        """Size of a query or key."""

    @property
    def value_dim(self) -> int:
        """Size of a value."""

    @property
    def conv_width(self) -> int:
        """Taps of the convolution."""


class AttentionShape(Protocol):
    """Sizes of attention layers; fomoe.model.spec.AttentionSpec is one."""

    @property
    def n_heads(self) -> int:
        """Query heads."""

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values."""

    @property
    def head_dim(self) -> int:
        """Size of a head."""

    @property
    def rope_dims(self) -> int:
        """Dimensions that are rotated."""

    @property
    def rope_base(self) -> float:
        """Base of the rotation's frequencies."""


@dataclass(frozen=True, slots=True)
class DeltaPlace:
    """Offsets of a DeltaNet layer's ring and memory."""

    ring: int
    memory: int


@dataclass(frozen=True, slots=True)
class KVPlace:
    """Offsets of an attention layer's keys and values, their type and the positions they hold."""

    keys: int
    values: int
    kv_dtype: str
    ctx: int


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Places of all layers, in the order given; `recurrent_bytes` at the start begin as zeros."""

    layers: tuple[DeltaPlace | KVPlace, ...]
    recurrent_bytes: int
    nbytes: int

    @classmethod
    def of(
        cls,
        kinds: Sequence[str],
        delta: DeltaShape,
        attention: AttentionShape,
        ctx: int,
        kv_dtype: str,
    ) -> StateLayout:
        """Lay out layers of kind "delta" or "attention" for `ctx` positions.

        Raises:
            DeviceError: `kv_dtype` is neither "f16" nor "f32", or a kind is unknown.
        """
        if kv_dtype not in _KV_BYTES:
            raise DeviceError(f"KV type {kv_dtype!r}: a GPU keeps f16 or f32")
        if unknown := set(kinds) - {"delta", "attention"}:
            raise DeviceError(f"layers of kind {sorted(unknown)}: there are delta and attention")
        ring = aligned(4 * delta.conv_width * channels(delta))
        memory = aligned(4 * delta.n_v_heads * delta.value_dim * delta.key_dim)
        cache = aligned(_KV_BYTES[kv_dtype] * _positions(ctx) * _kv_width(attention))
        recurrent = (ring + memory) * list(kinds).count("delta")
        places: list[DeltaPlace | KVPlace] = []
        delta_at, attention_at = 0, recurrent
        for kind in kinds:
            if kind == "delta":
                places.append(DeltaPlace(delta_at, delta_at + ring))
                delta_at += ring + memory
            else:
                places.append(KVPlace(attention_at, attention_at + cache, kv_dtype, ctx))
                attention_at += 2 * cache
        return cls(tuple(places), recurrent, attention_at)


def spans(layout: StateLayout, attention: AttentionShape, length: int) -> list[tuple[int, int]]:
    """Return (offset, bytes) of all that a pass after `length` tokens reads of a state."""
    found = [(0, layout.recurrent_bytes)] if layout.recurrent_bytes else []
    for place in layout.layers:
        if isinstance(place, KVPlace) and length:
            row = _KV_BYTES[place.kv_dtype] * _kv_width(attention)
            found += [(place.keys, length * row), (place.values, _positions(length) * row)]
    return found


def channels(delta: DeltaShape) -> int:
    """Return the width of the convolution: queries, keys and values."""
    return 2 * delta.n_k_heads * delta.key_dim + delta.n_v_heads * delta.value_dim


def _kv_width(attention: AttentionShape) -> int:
    return attention.n_kv_heads * attention.head_dim


def _positions(ctx: int) -> int:
    return (ctx + TILE - 1) // TILE * TILE
