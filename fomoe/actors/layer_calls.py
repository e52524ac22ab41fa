"""The driver's talk with devices that host layers: what they are sent and what they answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Regions
from fomoe.actors.layer_arm import LayerArm
from fomoe.actors.layer_link import LayerLink, OpenStep
from fomoe.actors.layer_traffic import LayerTraffic
from fomoe.actors.messages import DONE, FORESEEN, LAYERS, STEP_ID, Do, Tag
from fomoe.actors.shared_link import announce
from fomoe.engine.copies import COPY
from fomoe.engine.device_forward import Pass
from fomoe.engine.placed import Placed
from fomoe.errors import DeviceError, EngineError, PeerStalledError, StorageError

I32 = npt.NDArray[np.int32]
Records = npt.NDArray[np.void]
Orders = tuple[Records, Records]  # of `COPY` and of `ENTRY`, with a message

NO_COPIES = np.empty(0, COPY)
_NO_ORDERS: Orders = NO_COPIES, NO_COPIES
_LAYERS, _DONE = int(Tag.LAYERS), int(Tag.DONE)  # an enum's members take longer
_SPIN_US = 1000.0  # while a token is in flight: as long as a layer may take
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0
_STEP_BOUND_S = 120.0


class LayerCalls:
    """Messages to devices, and every wait of the driver for one.

    Attributes:
        step_id: of the message sent last.
        step: the pass under way.
        wanted: layer and experts int32 [n] that are waited for: a failed read of one ends the wait.
        arm: what storage is asked to compute through.
        foreseen: layer that a device has said something of, and which device; None: said nothing.
    """

    def __init__(
        self, fabric: Fabric, links: list[LayerLink], placed: Placed, traffic: LayerTraffic,
        arm: LayerArm,
    ) -> None:  # fmt: skip
        self.step_id = 0
        self.step = Pass(np.zeros(1, np.int32), 0, 0, overlap=True)
        self.wanted: tuple[int, I32] = 0, np.zeros(0, np.int32)
        self.foreseen: tuple[int, LayerLink] | None = None
        self._fabric = fabric
        self._links = links
        self._placed = placed
        self._traffic = traffic
        self.arm = arm
        self._buffer = bytearray(fabric.spec.slot_bytes)
        self._passes = 0
        self._is_far = any(link.node for link in links)  # whether anything must travel

    def open(self, step: Pass) -> None:
        """Begin a pass, which the devices hear of with their next messages."""
        for link in self._links:  # a pass that failed may have left something under way
            with suppress(StorageError):  # by now all have answered, and nobody wants it
                self.close(link)
        for link in self._links:
            link.given_up.clear()
        self.step = step
        self._passes += 1

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens, on every device."""
        for link in self._links:
            self.step_id = link.sent = self.step_id + 1
            rest = 0, length, to, origin, 0, 0, 0
            payload = LAYERS.pack(self.step_id, 0, Do.COPY_STATE, 0, *rest)
            link.sender.send(Tag.LAYERS, payload, (), _SEND_BOUND_S)

    def send(
        self, link: LayerLink, flags: int, layer: int, *, peer: int = 0, awaited: int = 0,
        rows: int = 1, orders: Orders = _NO_ORDERS,
    ) -> None:  # fmt: skip
        """Send a device a part of the pass; `orders` go with it."""
        step = self.step
        if link.begun != self._passes:
            link.begun = self._passes
            flags |= Do.BEGIN
        copies, entries = orders
        n_copies, n_entries = len(copies), len(entries)
        self.step_id = link.sent = self.step_id + 1
        payload = LAYERS.pack(
            self.step_id, awaited, flags, layer, len(step.tokens), step.position, step.state, peer,
            rows, n_copies, n_entries,
        )  # fmt: skip
        if n_copies:
            payload += copies.tobytes()
            if link.node == 0:
                announce(link.views.link, self.step_id)
        if n_entries:
            payload += entries.tobytes()
        regions = self._regions(link, flags, peer) if self._is_far else ()
        link.sender.send(_LAYERS, payload, regions, _SEND_BOUND_S)

    def send_back(
        self, link: LayerLink, flags: int, layer: int, copies: Records, *, peer: int = 0
    ) -> None:
        """Send the back of a layer; its slots are the device's until it has answered."""
        if flags & Do.PART:
            self.arm.ask(link, layer, self.step_id + 1)
        self.send(link, flags, layer, peer=peer, orders=(copies, NO_COPIES))
        if self._traffic.moves and flags & Do.BACK:
            link.open = OpenStep(self.step_id, layer, is_last=True)
            self._traffic.bring(layer)

    def _regions(self, link: LayerLink, flags: int, peer: int) -> Regions:
        """Return what a device on another box must see because of a message."""
        # Devices of one box give to each other in its memory, of which the driver's copy is stale.
        gives = bool(flags & Do.TAKE) and self._links[peer].node != link.node
        if link.node == 0 and not gives:
            return ()
        tokens = len(self.step.tokens)
        hidden = tokens * link.views.hidden.shape[1]
        picks = tokens * link.views.ids.shape[1]
        regions = link.layout.regions(
            link.arena, tokens=tokens, rows=len(link.views.rows), ids=picks, weights=picks
        )
        if gives:
            regions += link.layout.regions(self._links[peer].arena, word=1, hidden=hidden)
        return regions

    def close(self, link: LayerLink) -> None:
        """Wait until the planner's step on a device, if there is one, has been answered."""
        if link.open is not None:
            self.wait(link, link.open.id)

    def wait(
        self, link: LayerLink, step: int = 0, foresee: Callable[[], None] | None = None
    ) -> None:
        """Wait until a device has answered a step, or what was sent last: nothing else can wait.

        `foresee` is called while the wait goes on and something is `foreseen`.

        Raises:
            StorageError: an expert could not be read; nothing is under way any more.
        """
        wanted, deadline = step or link.sent, time.monotonic() + _STEP_BOUND_S
        while True:
            bell = self._fabric.bell()
            self._receive(link)
            if link.answered >= wanted:
                break
            self.listen()  # a device that failed keeps the others waiting
            if foresee is not None and self.foreseen is not None:
                foresee()
            if self._traffic.moves:
                self._check()
            if time.monotonic() > deadline:
                raise PeerStalledError(link.name, _STEP_BOUND_S)
            self._fabric.wait(bell, _SPIN_US, _WAIT_MS)
        if link.given_up and not step:
            self._blame(link)

    def _abort(self) -> None:
        """Let storage and every device give up what they have, and wait until each has answered.

        Storage first: a device's answer frees the slots that it computes in.
        """
        self.arm.abort(self.step_id)
        for link in self._links:
            link.sender.send(Tag.ABORT, STEP_ID.pack(self.step_id), (), _SEND_BOUND_S)
        deadline = time.monotonic() + _STEP_BOUND_S
        for link in self._links:
            while link.answered < link.sent:
                bell = self._fabric.bell()
                self._receive(link)
                if time.monotonic() > deadline:
                    raise PeerStalledError(link.name, _STEP_BOUND_S)
                if link.answered < link.sent:
                    self._fabric.wait(bell, _SPIN_US, _WAIT_MS)

    def listen(self) -> None:
        """Take what every device has answered; waits for nothing.

        Raises:
            DeviceError: as `_receive`.
        """
        for link in self._links:
            self._receive(link)

    def _receive(self, link: LayerLink) -> None:
        """Take a device's answers.

        Raises:
            DeviceError: it cannot go on; names it and says why.
        """
        while (message := link.receiver.try_recv(self._buffer)) is not None:
            if message[0] != _DONE:
                self._hear(link, *message)
                continue
            link.answered, aborted, _, computed_ns, waited_ns = DONE.unpack_from(self._buffer)
            if aborted:
                link.given_up.add(link.answered)
            self._answered(link, waited_ns, aborted=bool(aborted))
            self._placed.counters.compute_s += computed_ns / 1e9
            self._placed.counters.stall_s += waited_ns / 1e9
            if link.answered == link.sent:
                return  # whatever comes behind it can wait, a layer cannot

    def settle(self) -> None:
        """Take what devices and storage have reported while nobody waited.

        Raises:
            DeviceError: a device cannot go on.
        """
        self.listen()
        if all(link.open is None for link in self._links):
            self._traffic.settle()
        elif self._traffic.failures(*self.wanted):  # of a pass that nobody ended
            self._abort()

    def _hear(self, link: LayerLink, tag: int, nbytes: int) -> None:
        """Take what a device says beside its answers."""
        if tag == Tag.FAULT:
            text = self._buffer[:nbytes].decode(errors="replace")
            raise DeviceError(f"{link.name}: {text}")
        if tag == Tag.COPIED:
            self._traffic.ended(self._buffer, nbytes)
        elif tag == Tag.FORESEEN:
            self.foreseen = FORESEEN.unpack_from(self._buffer)[0], link

    def _answered(self, link: LayerLink, waited_ns: int, *, aborted: bool) -> None:
        """Tell the planner of the step that a device has answered for."""
        step = link.open
        if step is None or link.answered < step.id:
            return
        link.open = None
        if step.is_last and not aborted:
            self._placed.close(link.number, step.layer)
            if self._traffic.looks_ahead:
                self._traffic.answered(step.layer, waited_ns / 1e9)
        else:
            self._placed.answered(link.number, step.layer, aborted=aborted)

    def _blame(self, link: LayerLink) -> None:
        """Raise what made a device give a step up: storage, or a device, has failed or died."""
        link.given_up.clear()
        self._traffic.settle()
        for other in self._links:
            if other is not link:
                self._receive(other)
        raise EngineError(f"{link.name} gave a step up, and no other device has failed")

    def hear(self, link: LayerLink) -> None:
        """Take what devices and storage say; waits some milliseconds where `link` says nothing.

        Raises:
            StorageError: as `wait`.
        """
        bell = self._fabric.bell()
        before = link.answered
        self.listen()
        if link.answered > before:
            return
        self._check()
        self._fabric.wait(bell, _SPIN_US, _WAIT_MS)

    def _check(self) -> None:
        """Raise StorageError where a wanted expert could not be read, once all is at rest."""
        failed = self._traffic.failures(*self.wanted)
        if failed:
            self._abort()
            raise StorageError(failed[-1].message)
