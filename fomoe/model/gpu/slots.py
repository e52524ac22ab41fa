"""Places for routed experts in a device's memory, and the table that says who lies where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.gguf.extents import ExpertTable
from fomoe.kernels.gpu.arena import aligned
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import ExpertLayout
from fomoe.model.gpu.transfer import Mirror
from fomoe.model.spec import ModelSpec

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

_ADDRESS_BYTES = 8
_PARTS = 3


def expert_layout(table: ExpertTable, spec: ModelSpec, layer: int) -> ExpertLayout:
    """Return how an expert of the layer lies in a slot; DeviceError for types without kernels."""
    gate, up, down = (int(qtype) for qtype in table.types(layer))
    return ExpertLayout((gate, up, down), spec.hidden, spec.moe.expert_width)


def slot_bytes(layout: ExpertLayout) -> int:
    """Return the bytes from one slot to the next."""
    return aligned(layout.nbytes)


class ExpertSlots:
    """Slots by size class, as the `ExpertTable` counts the classes, and who is resident.

    The device's table holds uint64 [3, E] per hosted layer: where gate, up and down of an expert
    begin, zeros for one that is not resident. Gate lies first in a slot, so that the first row
    are the slots' own addresses. Methods take a layer's number in the model.
    """

    def __init__(
        self, gpu: GPU, table: ExpertTable, spec: ModelSpec, layers: Sequence[int]
    ) -> None:
        self._gpu = gpu
        self._layouts = {layer: expert_layout(table, spec, layer) for layer in layers}
        self._class = {layer: table.size_class(layer) for layer in layers}
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._stride = [0] * len(table.classes)
        for layer, layout in self._layouts.items():
            self._stride[self._class[layer]] = slot_bytes(layout)
        self._bases: list[int] = []
        self._counts: list[int] = []
        self._layer_bytes = _PARTS * spec.moe.n_experts * _ADDRESS_BYTES
        self._table = Mirror(gpu, (len(layers), _PARTS, spec.moe.n_experts), np.uint64)
        self._words: memoryview = self._table.host.reshape(-1).data  # an array's stores take longer
        self._n_experts = spec.moe.n_experts
        self._offsets = {layer: layout.offsets for layer, layout in self._layouts.items()}
        self._table.send()
        self._bring = {
            layer: self._table.bring(gpu, row * self._layer_bytes, self._layer_bytes)
            for layer, row in self._row.items()
        }

    def add(self, counts: Sequence[int]) -> None:
        """Take `counts[c]` slots of size class c out of the arena, once.

        Raises:
            DeviceError: the arena does not hold them, or there are slots already.
        """
        if self._counts:
            raise DeviceError("expert slots are there already; they are laid out once")
        self._bases = [
            self._gpu.arena.take(max(1, count * stride))
            for count, stride in zip(counts, self._stride, strict=True)
        ]
        self._counts = list(counts)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, in the table's order."""
        return tuple(self._row)

    @property
    def host_table(self) -> U64:
        """The host's twin of the table, uint64 [L, 3, E], L hosted layers in their order."""
        return self._table.host

    def row_address(self, layer: int) -> int:
        """Where the layer's uint64 [3, E] of the table lies on the device."""
        return self._table.address + self._row[layer] * self._layer_bytes

    def class_of(self, layer: int) -> int:
        """The size class of the layer's slots."""
        return self._class[layer]

    def layout(self, layer: int) -> ExpertLayout:
        """How an expert of the layer lies in its slot."""
        return self._layouts[layer]

    def slot_address(self, size_class: int, slot: int) -> int:
        """Where a slot begins on the device; DeviceError where the class has no such slot."""
        count = self._counts[size_class] if self._counts else 0
        if not 0 <= slot < count:
            raise DeviceError(f"slot {slot} of class {size_class}: there are {count}")
        return self._bases[size_class] + slot * self._stride[size_class]

    def write_wave(self, table: U64, layer: int, places: Iterable[tuple[int, int]]) -> None:
        """Write uint64 [3, E] with these (expert, slot) of the layer, and zeros for all others."""
        table[:] = 0
        for expert, slot in places:
            base = self.slot_address(self._class[layer], int(slot))
            table[:, expert] = [base + offset for offset in self._layouts[layer].offsets]

    def set(self, layer: int, expert: int, slot: int | None) -> None:
        """Note that the expert lies in a slot of its layer's class, or (None) nowhere.

        The device learns of it by `publish`.
        """
        words, n = self._words, self._n_experts
        at = _PARTS * n * self._row[layer] + expert
        if slot is None:
            words[at] = words[at + n] = words[at + 2 * n] = 0
            return
        base, (gate, up, down) = self.slot_address(self._class[layer], slot), self._offsets[layer]
        words[at], words[at + n], words[at + 2 * n] = base + gate, base + up, base + down

    def publish(self, layer: int | None = None) -> None:
        """Queue a copy of a layer's part (None: of the whole table) to the device."""
        if layer is None:
            self._table.send()
        else:
            self._gpu.launch(self._bring[layer])

    def load(self, layer: int, expert: int, slot: int, blocks: Sequence[U8]) -> None:
        """Write gate, up and down blocks into a slot and note it; waits for the copies.

        For loading and tests: while a pass runs, experts come by copies beside it.
        """
        base = self.slot_address(self._class[layer], slot)
        for offset, part in zip(self._layouts[layer].offsets, blocks, strict=True):
            self._gpu.upload(base + offset, np.ascontiguousarray(part))
        self.set(layer, expert, slot)
