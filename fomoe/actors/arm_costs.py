"""What an expert costs on this machine: measured once, before any is read, for the arm's table.

All of it for the model's largest class of experts, on whatever lies in memory: no kernel's time
depends on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fomoe.actors.expert_parts import part_bytes
from fomoe.engine.transfers import ENTRY
from fomoe.gguf.extents import ExpertTable

if TYPE_CHECKING:
    from fomoe.actors.layer_model import LayerModel
    from fomoe.actors.processor_arm import Experts

_TRIES = 9
_MOST = 64  # experts that are rotated over: more than caches hold


def largest_layer(table: ExpertTable, layers: Sequence[int]) -> int:
    """Return the first of the layers whose experts are the largest."""
    return max(layers, key=table.slot_bytes)


def processor_s(kernels: Experts, table: ExpertTable, room: int) -> float:
    """Return the seconds of one of a few experts that the processor computes in a step.

    `room` bytes of the segment are read.
    """
    layer = largest_layer(table, range(table.n_layers))
    each = table.slot_bytes(layer)
    places = max(1, min(room // each, _MOST))
    n = (kernels.top_k + 1) // 2
    entries = np.zeros(n, ENTRY)
    weights = np.full(n, 1.0 / n, np.float32)
    x, out = np.ones((1, kernels.hidden), np.float32), np.zeros((1, kernels.hidden), np.float32)

    def step(number: int) -> None:
        entries["address"] = (number * n + np.arange(n)) % places * each
        kernels.run(layer, entries, weights, x, out)

    return _median_s(step) / n


def link_s(
    model: LayerModel, table: ExpertTable, layer: int, source: tuple[int, int], slots: int
) -> float:
    """Return the seconds of an expert's copy into one of the first `slots` slots of its class.

    `source` is where bytes of the segment begin and how many there are.
    """
    runtime, stream = model.runtime, model.runtime.stream()
    first, room = source
    each = table.slot_bytes(layer)
    places = max(1, min(room // each, _MOST))
    sizes, offsets = part_bytes(table, layer), model.slots.layout(layer).offsets

    def copies(number: int) -> None:
        for at in range(number * _TRIES, (number + 1) * _TRIES):
            base = model.slots.slot_address(model.slots.class_of(layer), at % slots)
            start = first + at % places * each
            for nbytes, offset in zip(sizes, offsets, strict=True):
                runtime.copy(base + offset, start, nbytes, stream)
                start += nbytes
        runtime.synchronize(stream)

    return _median_s(copies) / _TRIES


def kernels_s(model: LayerModel, layer: int, top_k: int) -> float:
    """Return the seconds of one of a token's experts on the device; its first slots are free.

    State 0 is left as after a token, to be emptied.
    """
    ids = np.arange(top_k, dtype=np.int32)[None]
    weights = np.full((1, top_k), 1.0 / top_k, np.float32)
    model.begin(np.zeros(1, np.int32), 0, 0)
    model.front(layer)
    for expert in range(top_k):
        model.slots.set(layer, expert, expert)

    def backs(number: int) -> None:
        del number
        for _ in range(_TRIES):
            model.back(layer, ids, weights)
        model.runtime.synchronize(model.stream)

    try:
        return _median_s(backs) / (_TRIES * top_k)
    finally:
        for expert in range(top_k):
            model.slots.set(layer, expert, None)


def _median_s(work: Callable[[int], None]) -> float:
    """Return the median seconds of calls, the first of which is not counted."""
    times = []
    for number in range(_TRIES + 1):
        started = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
