"""The arm beside GPUs: storage's kernels compute some of a token's experts where they lie in RAM.

A token's layer with an arm, on its device, storage and the driver:

1. The device runs the front and writes, before its answer, the experts' input into its arena.
2. The driver plans the step. Those of its experts in RAM that `fomoe.engine.arm` lets stay go to
   storage (ARM), the others to the device with the layer's back (`Do.PART`).
3. Storage waits until their bytes have landed, writes their weighted sum into the device's arena
   and then the step's id, and rings the device.
4. The device has computed its own experts meanwhile; it waits for the sum and adds it.

The order is fixed: x = ((the device's experts, a chain of fma in ascending id, + shared expert) +
residual) + the sum of those in RAM, such a chain of its own.

Slots of the segment that are computed in belong to the step until the device has answered for it
(`CopyKind.COMPUTE`); where a step is given up, until storage has said that it reads them no more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fomoe.actors.channel import Fabric, Sender, load_acquire_u64
from fomoe.actors.layer_link import LayerLink
from fomoe.actors.messages import ARM, STEP_ID, Tag
from fomoe.actors.names import ARM_NODE, storage_name
from fomoe.engine.placed import Placed
from fomoe.errors import PeerDeadError, PeerStalledError

_SEND_BOUND_S = 5.0
_BOUND_S = 120.0


class LayerArm:
    """The driver's end of it.

    Args:
        fabric: of the driver.
        sender: to storage.
        placed: plans the steps, by the table from now on.
        table: how many of 0, 1, 2 .. experts in RAM stay there; none for an arm that is off.

    Attributes:
        on: whether any experts are computed in RAM at all.
    """

    def __init__(
        self, fabric: Fabric, sender: Sender, placed: Placed, table: Sequence[int]
    ) -> None:
        self.on = any(table) and not placed.on_devices
        self._fabric = fabric
        self._sender = sender
        self._placed = placed
        self._asked: tuple[LayerLink, int] | None = None
        if self.on:
            placed.planner.arrays.arm[:] = table

    def ask(self, link: LayerLink, layer: int, step: int) -> None:
        """Let storage compute what stays of the planned step, which the device hears of next."""
        weights, entries = self._placed.stay()
        head = ARM.pack(step, layer, link.number, len(entries))
        payload = head + weights.tobytes() + entries.tobytes()
        self._sender.send(Tag.ARM, payload, (), _SEND_BOUND_S)
        self._asked = link, step

    def abort(self, step: int) -> None:
        """Let storage give up steps up to this one, and wait until it reads no slot for them.

        Raises:
            PeerDeadError: storage has died.
            PeerStalledError: it has not answered within two minutes.
        """
        if self._asked is None:
            return
        (link, asked), name = self._asked, storage_name(ARM_NODE)
        self._sender.send(Tag.ABORT, STEP_ID.pack(step), (), _SEND_BOUND_S)
        deadline = time.monotonic() + _BOUND_S
        while load_acquire_u64(link.views.sum_word, 0) < asked:
            if self._fabric.peer_dead(name):
                raise PeerDeadError(name)
            if time.monotonic() > deadline:
                raise PeerStalledError(name, _BOUND_S)
            time.sleep(1e-4)  # storage rings the device, not this process
        self._asked = None
