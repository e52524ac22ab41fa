"""A device that hosts layers, played by the CPU kernels: same verbs, bits of the CPU path."""

from __future__ import annotations

import ctypes
import os
import sys

import numpy as np
from support import local_engine
from support.cpu_runtime import CpuRuntime, CpuSlots

from fomoe.actors import driver_dense, layers
from fomoe.actors.driver import DriverActor
from fomoe.actors.layers import LayerActor
from fomoe.actors.processes import CLASSES, ProcessHandle
from fomoe.engine import hosting
from fomoe.gguf.extents import ExpertTable
from fomoe.kernels.device import ExpertShape, open_device
from fomoe.model.layers import DenseModel
from fomoe.model.state import Batch, DeltaState, SequenceState
from fomoe.routing import group_by_expert, route_exact

DENSE_BYTES = 4 << 20


class CpuLayers:
    """See `fomoe.actors.layer_model.LayerModel`; half of it where `options.part` says so."""

    stream = 1

    def __init__(self, file, spec, options, counts=()):
        self.runtime = CpuRuntime()
        table = ExpertTable.from_gguf(file, spec.n_layers)
        if options.has_experts:
            self.slots = CpuSlots(table, options.layers, counts)
        self.spec, self.options = spec, options
        if options.is_dense:
            self._model = DenseModel(file, spec, options.max_tokens, int8=options.int8)
        self._places = None
        self._device = open_device("cpu", threads=1, int8=options.int8)
        sizes = spec.hidden, spec.moe.expert_width
        self._shapes = [ExpertShape.of(table, i, *sizes) for i in range(spec.n_layers)]
        self._states = [
            SequenceState(spec, options.ctx_size, options.kv_dtype) for _ in range(options.n_states)
        ]
        self.closed = False
        self._foreseen = None
        self.calls = []

    def lend(self, places):
        assert places.shift == 0
        self._places = places

    def begin(self, tokens, position, state):
        self.calls.append("begin")
        own = self._states[state]
        if self.options.is_dense:
            own.length = position
        self._batch = Batch.of([(own, tokens.tolist())])
        self._x = np.zeros((len(tokens), self.spec.hidden), np.float32)

    def embed(self):
        assert self.options.embedding
        self._x = self._model.embed(self._batch)
        self._foresee(0)

    def put_hidden(self, address):
        assert address - self._x.ctypes.data
        ctypes.memmove(self._x.ctypes.data, address, self._x.nbytes)

    def take_hidden(self, address):
        ctypes.memmove(address, self._x.ctypes.data, self._x.nbytes)

    def front(self, layer, *, gives_input=False):
        assert layer in self.options.layers
        self._model.mix(layer, self._x, self._batch)
        self._h, self._scores = self._model.scores(layer, self._x)
        if self._places is not None:
            self._places.x[: len(self._h)] = self._h
            self._places.scores[: len(self._h)] = self._scores
        self._ahead = None
        wanted = self.options.ahead and not gives_input
        if wanted and len(self._x) == 1 and layer + 1 < self.spec.n_layers:
            self._ahead = self._model.look_ahead(layer + 1, self._x).copy()

    def scores(self, layer):
        return self._scores

    def ahead(self):
        return self._ahead

    def input(self):
        return self._h

    def add(self, address):
        self._x += np.ctypeslib.as_array((ctypes.c_float * self.spec.hidden).from_address(address))

    def _take_input(self):
        """Experts alone know what the other process has left."""
        if not self.options.is_dense:
            tokens = len(self._x)
            self._h, self._scores = self._places.x[:tokens], self._places.scores[:tokens]

    def _end(self, layer, routed):
        if self.options.is_dense:
            self._model.close(self._x, routed, self._model.shared(layer, self._h))
        else:
            self._x = routed

    def close_layer(self, layer):
        assert not self.options.has_experts
        self._end(layer, self._places.sums[: len(self._x)].copy())
        self._foresee(layer + 1)

    def foreseen(self):
        found, self._foreseen = self._foreseen, None
        return found

    def _foresee(self, layer):
        if self.options.ahead and len(self._x) == 1 and layer < self.spec.n_layers:
            self._foreseen = layer, self._model.look_ahead(layer, self._x).copy()

    def gather(self, layer):
        self._take_input()
        self._route = route_exact(self._scores, self.spec.moe.top_k)
        self._groups = group_by_expert(self._route.ids)
        self._pairs = np.full((self._route.ids.size, self.spec.hidden), np.nan, np.float32)

    def wave(self, layer, experts, slots):
        groups, slot_of = self._groups, self.slots
        size_class, offsets = slot_of.class_of(layer), slot_of.layout(layer).offsets
        for expert, slot in zip(experts, slots, strict=True):
            at = int(np.flatnonzero(groups.experts == expert)[0])
            first, end = groups.pair_start[at], groups.pair_start[at + 1]
            base = slot_of.slot_address(size_class, int(slot))
            self._device.experts(
                self._shapes[layer], np.array([[base + o] for o in offsets], np.uint64), self._h,
                np.array([0, end - first], np.int32), groups.pair_token[first:end].copy(),
                self._pairs[first:end],
            )  # fmt: skip

    def combine(self, layer):
        routed = np.zeros((len(self._x), self.spec.hidden), np.float32)
        groups = self._groups
        weights = groups.arrange(self._route.weights)
        self._device.reduce(self._pairs, groups.order, weights, routed)
        self._end(layer, routed)

    def back(self, layer, ids, weights, *, by_host=True):
        self._take_input()
        tokens, k = ids.shape
        assert tokens > 1 or (np.diff(ids[0]) > 0).all()
        routed = np.zeros((tokens, self.spec.hidden), np.float32)
        if k:
            self._run_experts(layer, ids, weights, routed, by_host=by_host)
        self._end(layer, routed)
        self._foresee(layer + 1)

    def _run_experts(self, layer, ids, weights, out, *, by_host):
        groups = group_by_expert(np.ascontiguousarray(ids))
        pairs = np.zeros((ids.size, self.spec.hidden), np.float32)
        self._device.experts(
            self._shapes[layer], self.slots.addresses(layer, groups.experts, by_host=by_host),
            self._h, groups.pair_start, groups.pair_token, pairs,
        )  # fmt: skip
        self._device.reduce(pairs, groups.order, groups.arrange(weights), out)

    def back_hits(self, layer, routes, late):
        self._take_input()
        self.calls.append("hits")
        self._told = routes is not None
        ids, weights = routes if self._told else self._own_choice()
        self._half = ids[0].copy(), weights.copy(), late
        self._pairs = np.full((late.size, self.spec.hidden), np.nan, np.float32)
        self._run_some(layer, ~late, by_host=self._told)

    def back_late(self, layer):
        ids, weights, late = self._half
        self._run_some(layer, late, by_host=False)
        routed = np.zeros((1, self.spec.hidden), np.float32)
        order = np.arange(len(ids), dtype=np.int32)[None]
        self._device.reduce(self._pairs, order, weights, routed)
        self._end(layer, routed)
        self._foresee(layer + 1)

    def _run_some(self, layer, which, *, by_host):
        """Run some of a token's experts; bytes of the others may be anything."""
        ids, rows = self._half[0][which], np.flatnonzero(which)
        pairs = np.zeros((len(ids), self.spec.hidden), np.float32)
        self._device.experts(
            self._shapes[layer], self.slots.addresses(layer, ids, by_host=by_host), self._h,
            np.arange(len(ids) + 1, dtype=np.int32), np.zeros(len(ids), np.int32), pairs,
        )  # fmt: skip
        self._pairs[rows] = pairs

    def begin_and_front(self, tokens, position, state):
        self.begin(tokens, position, state)
        self.embed()
        self.front(0)

    def back_and_front(self, layer, routes):
        if routes:
            self.back(layer, *routes)
        else:
            self.own_back(layer)
        self.front(layer + 1)

    def prefill(self, tokens, position, state):
        self.begin(tokens, position, state)
        self.calls.append("whole")
        k = self.spec.moe.top_k
        chosen = np.zeros((self.spec.n_layers, self._batch.size, k), np.int32)
        self.embed()
        for layer in range(self.spec.n_layers):
            self.front(layer)
            chosen[layer] = self.own_back(layer)
        return chosen

    def own_back(self, layer):
        self._take_input()
        ids, weights = self._own_choice()
        self.back(layer, ids, weights, by_host=False)
        return ids

    def _own_choice(self):
        route = route_exact(self._scores, self.spec.moe.top_k)
        order = np.argsort(route.ids, axis=1)
        ids, weights = (np.take_along_axis(a, order, 1) for a in (route.ids, route.weights))
        return ids, weights

    def logits(self, rows):
        assert self.options.head
        return self._model.logits(self._x, rows.astype(np.intp))

    def largest(self, row):
        logits = self.logits(np.array([row]))[0]
        best = int(np.argmax(logits))
        return best, float(logits[best]), 0.0

    def reset(self, state):
        self._states[state].reset()

    def copy_state(self, to, origin, length):
        for mine, its in zip(self._states[to].layers, self._states[origin].layers, strict=True):
            if isinstance(mine, DeltaState):
                mine.conv[:], mine.memory[:] = its.conv, its.memory
            else:
                mine.k[:length], mine.v[:length] = its.k[:length], its.v[:length]

    def close(self):
        self.closed = True


def open_model(file, spec, config, device, slots):
    return CpuLayers(file, spec, hosting.host_options(config, spec)[device], slots)


def open_dense(file, spec, device, options):
    return CpuLayers(file, spec, options)


def planned_bytes(file, spec, options):
    return DENSE_BYTES if options.part == "all" else DENSE_BYTES // 2


def install():
    """Put these devices in the place of GPUs, for the rest of this process."""
    layers.open_model = open_model
    driver_dense.open_dense = open_dense
    hosting.planned_bytes = planned_bytes


class CpuDriver(DriverActor):
    """A driver in a process of its own, beside such devices."""

    def __init__(self, name):
        install()
        super().__init__(name)


class CpuLayerActor(LayerActor):
    """Such a device in a process of its own."""

    def __init__(self, name):
        install()
        super().__init__(name)


def play_devices(monkeypatch):
    """Let the CPU kernels play all devices that host layers; returns those that were opened."""
    found = []

    def open_and_keep(*args):
        found.append(open_model(*args))
        return found[-1]

    def open_dense_and_keep(*args):
        found.append(open_dense(*args))
        return found[-1]

    monkeypatch.setattr(layers, "open_model", open_and_keep)
    monkeypatch.setattr(driver_dense, "open_dense", open_dense_and_keep)
    monkeypatch.setattr(hosting, "planned_bytes", planned_bytes)
    return found


def play_processes(monkeypatch):
    """Let engines of `local_engine` run in processes of their own, which play their devices."""
    kinds = CLASSES | {
        "driver": "support.cpu_layers:CpuDriver", "layers": "support.cpu_layers:CpuLayerActor",
    }  # fmt: skip
    for role, kind in kinds.items():
        monkeypatch.setitem(local_engine._CLASSES, role, lambda name, kind=kind: (kind, name))
    monkeypatch.setattr(local_engine, "ThreadHandle", lambda made: ProcessHandle(*made))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
