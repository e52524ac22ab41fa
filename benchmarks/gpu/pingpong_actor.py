"""The layer actor of `pingpong.py`: a real one that can delay its layers and measure itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from device_time import ticks_launch, ticks_per_us
from pingpong_trace import Notes, note_device

from fomoe.actors.expert_parts import part_bytes
from fomoe.actors.layers import LayerActor, LayerPlan
from fomoe.actors.storage import landed_bytes
from fomoe.storage.segment import SegmentHandle

COPIES = 256
GATE_UP = 2 / 3  # of an expert's bytes, and so of a back's delay, which hits need not wait with


class PingPongActor(LayerActor):
    """A layer actor whose layers can take longer than they do, either half the same.

    Of a back in two turns each has its share: the first that of its experts' gate and up.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._notes: Notes | None = None

    def open(self, plan: LayerPlan, segment: SegmentHandle) -> None:
        """As ever, with a kernel in front of each half."""
        super().open(plan, segment)
        model: Any = self._model
        self._per_us, self._ticks, self._of_hits = ticks_per_us(model.gpu), 0, 0
        self._delay: Any = None
        self._delays: dict[int, Any] = {}  # by ticks
        for half in ("front", "back", "own_back"):
            setattr(model, half, self._delayed(model, getattr(model, half)))
        self._delay_turns(model)
        both, opening = model.back_and_front, model.begin_and_front

        def apart(layer: int, routes: Any) -> None:
            if self._delay is None:
                both(layer, routes)
                return
            model.own_back(layer) if routes is None else model.back(layer, *routes)
            model.front(layer + 1)

        def opening_apart(*begun: Any) -> None:
            if self._delay is None:
                opening(*begun)
                return
            model.begin(*begun)
            model.embed()
            model.front(0)

        model.back_and_front, model.begin_and_front = apart, opening_apart

    def _delayed(self, model: Any, half: Callable[..., None]) -> Callable[..., None]:
        def delayed(*args: Any, **options: Any) -> None:
            if self._delay is not None:
                model.gpu.launch(self._delay)
            half(*args, **options)

        return delayed

    def _delay_turns(self, model: Any) -> None:
        hits, rest = model.back_hits, model.back_late

        def delayed_hits(layer: int, routes: Any, late: Any) -> None:
            self._of_hits = round(GATE_UP * self._ticks * np.count_nonzero(~late) / late.size)
            self._wait(model, self._of_hits)
            hits(layer, routes, late)

        def delayed_rest(layer: int) -> None:
            self._wait(model, self._ticks - self._of_hits)
            rest(layer)

        model.back_hits, model.back_late = delayed_hits, delayed_rest

    def _wait(self, model: Any, ticks: int) -> None:
        if ticks:
            if ticks not in self._delays:
                self._delays[ticks] = ticks_launch(model.gpu, ticks)
            model.gpu.launch(self._delays[ticks])

    def delay(self, microseconds: float) -> None:
        """Let each layer take so much longer, from now on."""
        model: Any = self._model
        model.runtime.attach()
        self._ticks = round(microseconds / 2 * self._per_us)
        self._delays.clear()
        self._delay = ticks_launch(model.gpu, self._ticks) if self._ticks else None

    def trace(self) -> list[tuple[str, str, int, int]]:
        """Return the calls since the last time; the first time, begin to note them."""
        if self._notes is None:
            self._notes = note_device(self.name)
        return [tuple(call) for call in self._notes.taken()]

    def time_token(self, position: int) -> float:
        """Return the milliseconds of a token on the device, where all of it is here."""
        model: Any = self._model
        model.runtime.attach()
        return float(model.time_token(1, position))

    def link_rate(self) -> float:
        """Return bytes a second of copies of the same sizes, out of the same memory, alone.

        It overwrites experts; to be called last.
        """
        model: Any = self._model
        runtime, plan, segment = model.runtime, self._plan, self._segment
        assert segment is not None
        runtime.attach()
        layer = model.options.layers[0]
        sizes = part_bytes(self._table, layer)
        base = model.slots.slot_address(model.slots.class_of(layer), 0)
        first = segment.address + landed_bytes(plan.segment_slots)
        stride = -(-sum(sizes) // 4096) * 4096 + 4096
        room = max(1, (segment.nbytes - landed_bytes(plan.segment_slots)) // stride)
        starts = np.random.default_rng(1).permutation(room)[:COPIES].tolist()
        stream = runtime.stream()
        begin, end = runtime.event(timing=True), runtime.event(timing=True)
        for timed in (False, True):
            runtime.record(begin, stream)
            for at in starts:
                source = first + at * stride
                for nbytes, offset in zip(sizes, model.slots.layout(layer).offsets, strict=True):
                    runtime.copy(base + offset, source, nbytes, stream)
                    source += nbytes
            runtime.record(end, stream)
            runtime.synchronize(stream)
            if timed:
                return len(starts) * sum(sizes) / (runtime.elapsed_ms(begin, end) / 1e3)
        raise AssertionError
