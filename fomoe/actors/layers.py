"""Layer actor: one GPU, the layers that it hosts or their experts alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fomoe.actors.arm_costs import kernels_s, largest_layer, link_s
from fomoe.actors.channel import Fabric
from fomoe.actors.expert_copies import ExpertCopies, Source, as_records
from fomoe.actors.layer_device import LayerServer
from fomoe.actors.layer_layout import LayerArena, Neighbour
from fomoe.actors.layer_model import LayerModel, open_part
from fomoe.actors.messages import LAYERS, STEP_ID, Tag
from fomoe.actors.names import arena_name, device_name
from fomoe.actors.process import FabricMember, LoopThread
from fomoe.actors.shared_link import SharedLink
from fomoe.actors.storage import landed_bytes
from fomoe.config import EngineConfig
from fomoe.engine.copies import COPY
from fomoe.engine.hosting import host_options
from fomoe.errors import DeviceError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.spec import ModelSpec
from fomoe.storage.segment import Segment, SegmentHandle

_SPIN_US = 1000.0  # while a token is in flight: as long as a layer may take elsewhere
_LOOK_US = 50.0  # between two looks at copies: nobody rings when one has ended
_SEND_BOUND_S = 5.0
_BATCH = 64  # records of a message


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a device hosts: number `device` of the configuration's.

    `slots` are its own expert slots of each size class; experts come out of `segment_slots` slots
    of its node's segment.
    """

    config: dict[str, Any]
    device: int
    device_node: tuple[int, ...]
    slots: tuple[int, ...]
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
        self._hosted = host_options(config, spec)[plan.device].layers
        self._top_k = spec.moe.top_k
        self._moves = sum(plan.slots) < self._table.n_experts * len(self._hosted)
        self._model = open_model(file, spec, config, plan.device, plan.slots)

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
        landed = segment.view[: plan.segment_slots * 8].view(np.uint64)
        source = Source(landed, segment.address + landed_bytes(plan.segment_slots))
        link = shared_link(fabric, self._neighbours, plan.device)
        self._copies = ExpertCopies(model.runtime, model.slots, source, self._table, link)
        self._deferred: deque[bytes] = deque()  # messages that came while another one waited
        self._server = LayerServer(
            model, self._copies, fabric, (self._neighbours, plan.device), self._listen,
            moves=self._moves,
            remote=plan.device_node[plan.device] != 0,
        )  # fmt: skip
        self._attached = False
        self._loop = loop
        loop.start()

    def arm_costs(self) -> tuple[float, float]:
        """Return the seconds of an expert of the largest class: copied here, and computed.

        To be called before anything is asked of the device.
        """
        model, segment, plan = self._model, self._segment, self._plan
        assert model is not None
        assert segment is not None
        model.runtime.attach()
        layer, header = largest_layer(self._table, self._hosted), landed_bytes(plan.segment_slots)
        source = segment.address + header, segment.nbytes - header
        slots = plan.slots[self._table.size_class(layer)]
        copy_s = link_s(model, self._table, layer, source, slots)
        return copy_s, kernels_s(model, layer, self._top_k)

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
        if self._deferred:
            self._server.serve(self._deferred.popleft())
            return True
        bell = self.fabric.bell()
        message = self._from_driver.try_recv(self._buffer)
        if message is None:
            return self._advance_copies(bell)
        tag, nbytes = message
        if tag == Tag.LAYERS:
            layers = bytes(self._buffer[:nbytes])  # what comes while it is served needs the buffer
            if nbytes > LAYERS.size:
                self._server.take(layers)
            self._server.serve(layers)
        else:
            self._take(tag, nbytes)
        return True

    def _listen(self) -> None:
        """Take what has come while a step waits.

        Raises:
            DeviceError: this process is to end.
        """
        if self._loop is not None and self._loop.stopping:
            raise DeviceError("the engine stops while a step is under way")
        self._answer_copies()
        while (message := self._from_driver.try_recv(self._buffer)) is not None:
            tag, nbytes = message
            if tag == Tag.LAYERS:
                self._deferred.append(bytes(self._buffer[:nbytes]))
                self._server.take(self._deferred[-1])
            else:
                self._take(tag, nbytes)

    def _take(self, tag: int, nbytes: int) -> None:
        if tag == Tag.COPY:
            self._copies.order(np.frombuffer(bytes(self._buffer[:nbytes]), COPY))
        elif tag == Tag.ABORT:
            self._server.abort(STEP_ID.unpack_from(self._buffer)[0])

    def _advance_copies(self, bell: int) -> bool:
        copies = self._copies
        copies.advance()
        answered = self._answer_copies()
        if not answered and copies.under_way:
            self.fabric.wait(bell, _LOOK_US, 0.0)
        return answered or copies.under_way

    def _answer_copies(self) -> bool:
        """Send back the records of ahead lists that have ended; returns whether there were any."""
        ended = self._copies.ended
        if ended and not self._moves:  # whole passes look at the device's table alone
            self._copies.publish_all()
        for start in range(0, len(ended), _BATCH):
            records = as_records(ended[start : start + _BATCH]).view(np.uint8)
            self._to_driver.send(Tag.COPIED, records, (), _SEND_BOUND_S)
        self._copies.ended = []
        return bool(ended)

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
        try:
            if self._model is not None and (self._loop is None or not self._loop.alive):
                self._release(self._model)
        finally:  # a device that failed may refuse
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
            device_name(i),
            arena_name(i),
            LayerArena(spec, options),
            config.devices[i],
        )
        for i, options in enumerate(host_options(config, spec))
    ]


def shared_link(fabric: Fabric, devices: list[Neighbour], number: int) -> SharedLink:
    """Return what a device tells those that are the same card in other processes."""
    words = [d.layout.views(fabric.arena(d.arena)).link for d in devices]
    others = [i for i, d in enumerate(devices) if d.link == devices[number].link and i != number]
    return SharedLink(words[number], [words[i] for i in others])


def open_model(
    file: GGUFFile, spec: ModelSpec, config: EngineConfig, device: int, slots: tuple[int, ...]
) -> LayerModel:
    """Open a device and read its part of the model; it has so many expert slots of each class."""
    options = host_options(config, spec)[device]
    if sum(slots) >= len(options.layers) * spec.moe.n_experts:
        options = replace(options, ahead=False)  # everything is there
    else:
        options = replace(options, late=True)
    return open_part(file, spec, config.devices[device], options, slots)
