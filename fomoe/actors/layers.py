"""Layer actor: one GPU, the layers that it hosts, the experts in its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from fomoe.actors.expert_copies import ExpertCopies, Source
from fomoe.actors.layer_device import LayerModel, LayerServer, Neighbour
from fomoe.actors.layer_layout import LayerArena
from fomoe.actors.messages import COPY, COUNT, Tag
from fomoe.actors.names import arena_name, device_name
from fomoe.actors.process import FabricMember, LoopThread
from fomoe.actors.storage import landed_bytes
from fomoe.config import EngineConfig
from fomoe.devices import local_name
from fomoe.engine.hosting import host_options
from fomoe.errors import DeviceError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.spec import ModelSpec
from fomoe.storage.segment import Segment, SegmentHandle

_SPIN_US = 200.0  # while a token is in flight
_NAP_S = 50e-6  # between two looks at copies: nobody rings when one has ended
_SEND_BOUND_S = 5.0


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a device hosts: number `device` of the configuration's, out of `segment_slots` slots."""

    config: dict[str, Any]
    device: int
    device_node: tuple[int, ...]
    segment_slots: int


class LayerActor(FabricMember):
    """Hosts whole layers on one GPU and does what the driver decides.

    The device's memory belongs to the process: it is free again when the process has ended,
    however it ended.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._loop: LoopThread | None = None
        self._segment: Segment | None = None
        self._model: LayerModel | None = None

    def open(self, plan: LayerPlan, segment: SegmentHandle) -> None:
        """Take the device, read the dense weights into it and map the storage actor's segment.

        Raises:
            DeviceError: the device, its driver or its memory is not there.
        """
        config = EngineConfig.from_dict(plan.config)
        file = open_gguf(config.model)
        spec = read_spec(file)
        self._plan = plan
        self._name = config.devices[plan.device]
        self._table = ExpertTable.from_gguf(file, spec.n_layers)
        self._segment = Segment.attach(segment)
        self._neighbours = neighbours(config, spec)
        self._model = open_model(file, spec, config, plan.device)

    def start(self) -> None:
        """Begin to serve."""
        plan, fabric, model, segment = self._plan, self.fabric, self._model, self._segment
        assert model is not None
        assert segment is not None
        self._from_driver = fabric.receiver("driver")
        self._to_driver = fabric.sender("driver")
        self._buffer = bytearray(fabric.spec.slot_bytes)
        model.runtime.attach()  # this may be another thread than the one that opened it
        model.runtime.register(segment.view)
        loop = LoopThread(self, self.poll, self.status, _SPIN_US)
        self._server = LayerServer(
            model, fabric, plan.device, self._neighbours, lambda: loop.stopping
        )
        landed = segment.view[: plan.segment_slots * 8].view(np.uint64)
        source = Source(landed, segment.address + landed_bytes(plan.segment_slots))
        self._copies = ExpertCopies(model.runtime, model.slots, source, self._table)
        self._attached = False
        self._loop = loop
        loop.start()

    def poll(self) -> bool:
        """Serve one message if there is one, and bring experts on their way.

        Raises:
            DeviceError: the device failed; the driver has been told.
        """
        assert self._model is not None
        try:
            if not self._attached:  # the device was opened by the thread that takes calls
                self._model.runtime.attach()
                self._attached = True
            return self._poll()
        except DeviceError as error:
            text = f"{self._name}: {error}".encode()[: self.fabric.spec.slot_bytes]
            self._to_driver.send(Tag.FAULT, text, (), _SEND_BOUND_S)
            raise

    def _poll(self) -> bool:
        message = self._from_driver.try_recv(self._buffer)
        if message is None:
            return self._advance_copies()
        tag, nbytes = message
        if tag == Tag.LAYERS:
            self._server.serve(self._buffer)
        elif tag == Tag.COPY:
            self._copies.ask(np.frombuffer(bytes(self._buffer[:nbytes]), COPY))
        return True

    def _advance_copies(self) -> bool:
        ended = self._copies.advance()
        if ended:
            self._to_driver.send(Tag.COPIED, COUNT.pack(ended), (), _SEND_BOUND_S)
        if not ended and self._copies.under_way:
            time.sleep(_NAP_S)
        return ended > 0 or self._copies.under_way

    def status(self) -> str:
        """Return one line for the log."""
        server = self._server
        return (
            f"{self._name}  {server.steps:,} steps  computing {server.compute_ns / 1e9:.1f} s  "
            f"waiting {server.wait_ns / 1e9:.1f} s  copied {self._copies.nbytes / 1e9:.1f} GB"
        )

    def stats(self) -> dict[str, float]:
        """Return counters of this device."""
        server = self._server
        return {
            "steps": server.steps,
            "compute_s": server.compute_ns / 1e9,
            "stall_s": server.wait_ns / 1e9,
            "copied_bytes": self._copies.nbytes,
        }

    def stop(self) -> None:
        """End the loop."""
        if self._loop is not None:
            self._loop.stop()

    def leave(self) -> None:
        """Leave the fabric, the segment and the device."""
        super().leave()
        if self._model is not None and (self._loop is None or not self._loop.alive):
            self._release(self._model)
        if self._segment is not None:
            self._segment.close()

    def _release(self, model: LayerModel) -> None:
        """Give the device back; a loop that hangs in it would still use it."""
        model.runtime.attach()
        if self._loop is not None and self._segment is not None:
            self._server.close()
            model.runtime.unregister(self._segment.view)
        model.close()


def neighbours(config: EngineConfig, spec: ModelSpec) -> list[Neighbour]:
    """Return all devices of an engine, with the layouts of their arenas."""
    return [
        Neighbour(
            device_name(i), arena_name(i), LayerArena(spec, options.max_tokens, head=options.head)
        )
        for i, options in enumerate(host_options(config, spec))
    ]


def open_model(file: GGUFFile, spec: ModelSpec, config: EngineConfig, device: int) -> LayerModel:
    """Open a device and read its part of the model.

    Imported here: who has no GPU needs no driver of one.
    """
    from fomoe.kernels.gpu.gpu import open_gpu
    from fomoe.model.gpu.host import GPUModel, planned_bytes, resident_bytes

    options = host_options(config, spec)[device]
    nbytes = planned_bytes(file, spec, options) + resident_bytes(file, spec, options)
    model = GPUModel(open_gpu(local_name(config.devices[device]), nbytes), file, spec, options)
    model.add_all_slots()
    return model
