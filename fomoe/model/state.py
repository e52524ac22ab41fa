"""What a sequence remembers in each layer, and how to set it aside and take it up again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.model.buffers import F32
from fomoe.model.spec import ModelSpec

Array = npt.NDArray[np.floating[Any]]
I32 = npt.NDArray[np.int32]


@dataclass(slots=True)
class KVCache:
    """Keys and values of one attention layer: [ctx, n_kv_heads, head_dim], float16 or float32."""

    k: Array
    v: Array


@dataclass(slots=True)
class DeltaState:
    """Memory of one DeltaNet layer.

    `conv` float32 [conv_width - 1, channels] holds the last inputs of the convolution, `memory`
    float32 [n_v_heads, key_dim, value_dim] the recurrent state.
    """

    conv: F32
    memory: F32


LayerState = KVCache | DeltaState


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a sequence's state after `length` tokens."""

    length: int
    arrays: tuple[tuple[Array, Array], ...]


class SequenceState:
    """State of one sequence over all layers; `length` tokens have gone through."""

    def __init__(self, spec: ModelSpec, ctx_size: int, kv_dtype: str) -> None:
        self.length = 0
        self.ctx_size = ctx_size
        self.layers: tuple[LayerState, ...] = tuple(
            _layer_state(spec, kind, ctx_size, kv_dtype) for kind in spec.layers
        )

    def reset(self) -> None:
        """Forget everything; the memory stays reserved."""
        self.length = 0
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.conv.fill(0.0)
                layer.memory.fill(0.0)

    def snapshot(self) -> Snapshot:
        """Copy what the next token depends on (keys and values of `length` positions only)."""
        pairs: list[tuple[Array, Array]] = []
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                pairs.append((layer.conv.copy(), layer.memory.copy()))
            else:
                pairs.append((layer.k[: self.length].copy(), layer.v[: self.length].copy()))
        return Snapshot(self.length, tuple(pairs))

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of the same model and KV type."""
        for layer, (first, second) in zip(self.layers, snapshot.arrays, strict=True):
            if isinstance(layer, DeltaState):
                np.copyto(layer.conv, first, casting="no")
                np.copyto(layer.memory, second, casting="no")
            else:
                np.copyto(layer.k[: snapshot.length], first, casting="no")
                np.copyto(layer.v[: snapshot.length], second, casting="no")
        self.length = snapshot.length

    @property
    def nbytes(self) -> int:
        """Bytes reserved for this sequence."""
        return sum(first.nbytes + second.nbytes for first, second in map(_arrays, self.layers))


class HostedState(SequenceState):
    """A state whose arrays lie on devices, which know it by `number`; here tokens are counted.

    A pass that begins at position 0 begins with an empty state.
    """

    def __init__(self, ctx_size: int, number: int = 0) -> None:
        self.length = 0
        self.ctx_size = ctx_size
        self.number = number
        self.layers = ()


class TwinState(SequenceState):
    """A state to try one token on: recurrent memory of its own, keys and values of the original.

    One copy of the recurrent memory is all that trying costs; keys and values of earlier positions
    are only read.
    """

    def __init__(self, original: SequenceState) -> None:
        self.length = 0
        self.ctx_size = original.ctx_size
        self._original = original
        self.layers = tuple(
            layer
            if isinstance(layer, KVCache)
            else DeltaState(np.empty_like(layer.conv), np.empty_like(layer.memory))
            for layer in original.layers
        )

    @property
    def state(self) -> SequenceState:
        """Itself: what a trial's batch is made of."""
        return self

    def take(self) -> None:
        """Take the original's state as it is now."""
        self.length = self._original.length
        for mine, its in zip(self.layers, self._original.layers, strict=True):
            if isinstance(mine, DeltaState) and isinstance(its, DeltaState):
                np.copyto(mine.conv, its.conv)
                np.copyto(mine.memory, its.memory)

    @contextmanager
    def borrowed_row(self) -> Iterator[None]:
        """Give the original back the keys and values of the position that is tried inside."""
        at = self.length
        caches = [layer for layer in self.layers if isinstance(layer, KVCache)]
        kept = [(cache.k[at].copy(), cache.v[at].copy()) for cache in caches]
        try:
            yield
        finally:
            for cache, (k, v) in zip(caches, kept, strict=True):
                cache.k[at], cache.v[at] = k, v


def _arrays(layer: LayerState) -> tuple[Array, Array]:
    return (layer.k, layer.v) if isinstance(layer, KVCache) else (layer.conv, layer.memory)


def _layer_state(spec: ModelSpec, kind: str, ctx_size: int, kv_dtype: str) -> LayerState:
    if kind == "attention":
        shape = (ctx_size, spec.attention.n_kv_heads, spec.attention.head_dim)
        dtype = np.dtype(np.float16 if kv_dtype == "f16" else np.float32)
        return KVCache(np.zeros(shape, dtype), np.zeros(shape, dtype))
    delta = spec.delta
    return DeltaState(
        np.zeros((delta.conv_width - 1, delta.channels), np.float32),
        np.zeros((delta.n_v_heads, delta.key_dim, delta.value_dim), np.float32),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one sequence inside a batch: rows start..stop, from `position` on."""

    state: SequenceState
    start: int
    stop: int
    position: int

    def rows_of(self, x: F32) -> F32:
        """Return this run's rows of an array [T, ...] of the whole batch."""
        return x if self.start == 0 and self.stop == len(x) else x[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of one or several sequences that go through the layers together.

    `tokens` int32 [T], `positions` int32 [T]; each sequence has one run.
    """

    tokens: I32
    positions: I32
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """Number of tokens T."""
        return len(self.tokens)

    @classmethod
    def of(cls, parts: list[tuple[SequenceState, list[int]]]) -> Batch:
        """Lay the next tokens of each sequence one behind the other."""
        tokens: list[int] = []
        positions: list[int] = []
        runs = []
        for state, ids in parts:
            start = len(tokens)
            tokens.extend(ids)
            positions.extend(range(state.length, state.length + len(ids)))
            runs.append(Run(state, start, len(tokens), state.length))
        return cls(np.array(tokens, np.int32), np.array(positions, np.int32), tuple(runs))

    def advance(self) -> None:
        """Count the batch's tokens into their sequences, after all layers have seen them."""
        for run in self.runs:
            run.state.length = run.position + run.stop - run.start
