"""States of sequences in a device's memory: to empty, to copy, to set aside and take up again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.state import DeltaPlace, KVPlace, StateLayout, spans
from fomoe.model.gpu.options import HostOptions
from fomoe.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """A copy of what a state holds after `length` tokens, piece by piece."""

    length: int
    pieces: tuple[npt.NDArray[np.uint8], ...]


def state_layout(spec: ModelSpec, options: HostOptions) -> StateLayout:
    """Return where the hosted layers' states lie, in the layers' order."""
    kinds = [spec.layers[layer] for layer in options.layers]
    return StateLayout.of(kinds, spec.delta, spec.attention, options.ctx_size, options.kv_dtype)


class States:
    """`n_states` states of the hosted layers, numbered from 0."""

    def __init__(self, gpu: GPU, spec: ModelSpec, options: HostOptions) -> None:
        self._gpu = gpu
        self._layout = state_layout(spec, options)
        self._places = dict(zip(options.layers, self._layout.layers, strict=True))
        self._attention = spec.attention
        self._ctx = options.ctx_size
        count = options.n_states if options.is_dense else 0
        self._bases = [gpu.arena.take(self._layout.nbytes) for _ in range(count)]
        for state in range(count):
            self.reset(state)

    def base(self, state: int) -> int:
        """Where a state begins on the device; DeviceError where there is none of the number."""
        if not 0 <= state < len(self._bases):
            raise DeviceError(f"state {state}: the device holds {len(self._bases)}")
        return self._bases[state]

    def place(self, layer: int) -> DeltaPlace | KVPlace:
        """Where the state of a layer (its number in the model) lies in any state."""
        return self._places[layer]

    def reset(self, state: int) -> None:
        """Queue the emptying of a state; keys and values of earlier tokens are never read again."""
        recurrent = self._layout.recurrent_bytes
        if recurrent:
            self._gpu.runtime.fill(self.base(state), 0, recurrent, self._gpu.stream)

    def copy(self, to: int, origin: int, length: int) -> None:
        """Queue a copy that makes a state what another one is after `length` tokens."""
        target, source = self.base(to), self.base(origin)
        for offset, nbytes in self._spans(length):
            self._gpu.runtime.copy(target + offset, source + offset, nbytes, self._gpu.stream)

    def snapshot(self, state: int, length: int) -> StateSnapshot:
        """Return a copy in the host's memory of a state after `length` tokens; waits for it."""
        base = self.base(state)
        return StateSnapshot(
            length,
            tuple(
                self._gpu.download(base + offset, np.uint8, nbytes)
                for offset, nbytes in self._spans(length)
            ),
        )

    def restore(self, state: int, snapshot: StateSnapshot) -> None:
        """Return a state to a snapshot of the same layers and KV type; waits for it."""
        base = self.base(state)
        for (offset, _), piece in zip(self._spans(snapshot.length), snapshot.pieces, strict=True):
            self._gpu.upload(base + offset, piece)

    def _spans(self, length: int) -> list[tuple[int, int]]:
        """Return (offset, bytes) of what the next token depends on."""
        if not 0 <= length <= self._ctx:
            raise DeviceError(f"a state after {length} tokens: the context holds {self._ctx}")
        return spans(self._layout, self._attention, length)
