"""What a device's driver and its expert slots are to actors, in plain memory of this process."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

from fomoe.actors.expert_parts import part_bytes

ALIGN = 256


class CpuRuntime:
    """The part of a driver that actors call; everything has happened when a call returns."""

    def __init__(self):
        self.registered = []
        self.streams = 0

    def attach(self):
        pass

    def register(self, array):
        self.registered.append(array.ctypes.data)
        return array.ctypes.data

    def unregister(self, array):
        self.registered.remove(array.ctypes.data)

    def stream(self):
        self.streams += 1
        return self.streams

    def event(self, timing=False):
        return 1

    def record(self, event, stream):
        pass

    def wait(self, event, stream):
        pass

    def done(self, event):
        return True

    def synchronize(self, stream):
        pass

    def copy(self, to, source, nbytes, stream):
        ctypes.memmove(to, source, nbytes)


class CpuSlots:
    """Slots of experts in plain memory; the device's table is what `publish` has shown it."""

    def __init__(self, table, layers, counts):
        self._table = table
        self._classes = sorted({table.size_class(layer) for layer in layers})
        self._parts = {table.size_class(layer): part_bytes(table, layer) for layer in layers}
        self._memory = {}
        for layer in layers:
            c = table.size_class(layer)
            self._memory.setdefault(c, np.zeros(counts[c] * self.slot_bytes(c), np.uint8))
        self._set = np.zeros((table.n_layers, table.n_experts), np.uint64)
        self.published = self._set.copy()

    def _offsets(self, size_class):
        starts, at = [], 0
        for nbytes in self._parts[size_class]:
            starts.append(at)
            at += -(-nbytes // ALIGN) * ALIGN
        return tuple(starts), at

    def slot_bytes(self, size_class):
        return self._offsets(size_class)[1]

    def class_of(self, layer):
        return self._table.size_class(layer)

    def layout(self, layer):
        return SimpleNamespace(offsets=self._offsets(self.class_of(layer))[0])

    def slot_address(self, size_class, slot):
        memory, size = self._memory[size_class], self.slot_bytes(size_class)
        assert 0 <= slot < memory.nbytes // size
        return memory.ctypes.data + slot * size

    def set(self, layer, expert, slot):
        address = 0 if slot is None else self.slot_address(self.class_of(layer), slot)
        self._set[layer, expert] = address

    def publish(self, layer=None):
        which = slice(None) if layer is None else layer
        self.published[which] = self._set[which]

    def addresses(self, layer, ids, *, by_host):
        base = (self._set if by_host else self.published)[layer, ids]
        assert base.all(), f"layer {layer}: experts {ids[base == 0]} are not there"
        return base[None] + np.array(self.layout(layer).offsets, np.uint64)[:, None]
