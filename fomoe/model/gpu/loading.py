"""Every expert of a device's layers out of the file, where all of them have a slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fomoe.gguf.extents import ExpertTable, tensor_name
from fomoe.gguf.reader import GGUFFile
from fomoe.model.gpu.slots import U8, ExpertSlots


def slot_counts(slots: ExpertSlots, table: ExpertTable, layers: Sequence[int]) -> list[int]:
    """Return the slots of each size class that hold every expert of the layers."""
    classes = [slots.class_of(layer) for layer in layers]
    return [table.n_experts * classes.count(c) for c in range(len(table.classes))]


def load_all(slots: ExpertSlots, file: GGUFFile, table: ExpertTable, layers: Sequence[int]) -> None:
    """Read the layers' experts into slots, one after the other, and publish them."""
    used = [0] * len(table.classes)
    for layer in layers:
        size_class = slots.class_of(layer)
        for expert, blocks in enumerate(_experts(file, table, layer)):
            slots.load(layer, expert, used[size_class], blocks)
            used[size_class] += 1
    slots.publish()


def _experts(file: GGUFFile, table: ExpertTable, layer: int) -> Iterator[list[U8]]:
    """Yield gate, up and down blocks of each expert of a layer."""
    tensors = [file.read(tensor_name(layer, part)) for part in table.part_names]
    parts = [tensor.reshape(table.n_experts, -1) for tensor in tensors]
    if len(parts) == 2:  # fused: the gate's rows lie before the up projection's
        half = parts[0].shape[1] // 2
        parts = [parts[0][:, :half], parts[0][:, half:], parts[1]]
    for expert in range(table.n_experts):
        yield [part[expert] for part in parts]
