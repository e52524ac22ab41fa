"""The driver's orders for experts of hosted layers: reads of storage, ahead lists of devices."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric
from fomoe.actors.layer_link import LayerLink
from fomoe.actors.messages import ReadFailed, Tag
from fomoe.actors.reads import Reads
from fomoe.actors.step import NodeLink
from fomoe.engine.ahead import Governor
from fomoe.engine.copies import COPY
from fomoe.engine.placed import Placed
from fomoe.engine.waves import BACKGROUND, GUESSED
from fomoe.model.buffers import F32

SEND_BOUND_S = 5.0
_BATCH = 64  # records of a message

# What a guess is made from, in place of a distance: the stream when the layer before had its
# scores, or the one that goes into the layer. What came of guesses is counted apart.
FROM_SCORES, FROM_STREAM = 1, 2

_Records = npt.NDArray[np.void]


class _Asked(NamedTuple):
    """A token's step: when its reads were sent, how long after the answer before, how many.

    `guessed` are wanted experts that a look-ahead had asked for.
    """

    at: float
    window_s: float
    reads: int
    guessed: int


class LayerTraffic:
    """Sends what the planner ordered, and tells it what became of that; waits for nothing.

    Attributes:
        reads: the talk with storage.
        moves: whether experts move at all, which they do not where each has a slot of its device.
        looks_ahead: whether devices say what the next layer's router would, and that is brought.
    """

    def __init__(
        self, fabric: Fabric, nodes: list[NodeLink], links: list[LayerLink], placed: Placed,
        governor: Governor, *, ahead: bool,
    ) -> None:  # fmt: skip
        self.reads = Reads(fabric, nodes, placed.planner, governor, placed.counters)
        self.moves = not placed.on_devices
        self.looks_ahead = ahead and self.moves
        self._governor = governor
        self._guesses = [0] * placed.topology.n_layers  # reads asked for, until the layer's step
        self._asked: dict[int, _Asked] = {}  # by layer, until it is answered
        self._answered = time.monotonic()
        self._links = links
        self._placed = placed
        self._home = [links[d] for d in placed.topology.layer_device]

    def token(self) -> None:
        """A token's pass begins: choose which guesses are worth a read of storage."""
        self._governor.token()

    def asked(self, layer: int, reads: int) -> None:
        """A token's step was planned: time it, and drop the guesses that it does not want."""
        counts, now = self._placed.planner.arrays.counts, time.monotonic()
        guessed = int(counts[GUESSED])
        demanded = reads - guessed - int(counts[BACKGROUND])
        self._asked[layer] = _Asked(now, now - self._answered, demanded, guessed)
        in_vain, self._guesses[layer] = self._guesses[layer] - guessed, 0
        if in_vain > 0:
            self.reads.drop_guesses(layer)

    def answered(self, layer: int, waited_s: float) -> None:
        """A step was answered, which may be a prompt's; its device waited so long for storage."""
        self._answered = time.monotonic()
        step = self._asked.pop(layer, None)
        if layer and step:  # before the first one lies the end of the token before
            took = self._answered - step.at
            self._governor.step(step.window_s, took, waited_s, step.reads, step.guessed)

    def read(self, layer: int, count: int) -> None:
        """Send the reads that the planner's last call for the layer asks for."""
        if count:
            self.reads.send(layer, count)

    def bring(self, layer: int) -> None:
        """Send the ahead list of that call, behind the step's own copies."""
        copies = self._placed.planner.ahead_copies
        if len(copies):
            self.send(self._home[layer], copies)

    def send(self, link: LayerLink, copies: _Records) -> None:
        """Send records of `COPY` that belong to no step."""
        for start in range(0, len(copies), _BATCH):
            payload = copies[start : start + _BATCH].tobytes()
            link.sender.send(Tag.COPY, payload, (), SEND_BOUND_S)

    def give_up_guesses(self, layer: int) -> None:
        """Take back what was guessed for a step that was sent, as far as it has not begun."""
        self._placed.planner.give_up_guesses()
        self.bring(layer)

    def look_ahead(self, layer: int, scores: F32, origin: int) -> None:
        """Bring what the layer, the next one, will want, behind all demand.

        `origin` is `FROM_SCORES` or `FROM_STREAM`.
        """
        placed = self._placed
        counters, before = placed.counters, placed.counters.nvme_bytes
        count = placed.planner.look_ahead(layer, scores, origin)
        self._guesses[layer] += count
        self.read(layer, count)
        self.bring(layer)
        placed.planner.charge(counters, decoding=True)
        counters.prefetch_bytes += counters.nvme_bytes - before

    def read_later(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Bring experts that were wanted and did not run, behind all demand."""
        placed = self._placed
        self.read(layer, placed.planner.read_later(layer, experts))
        self.bring(layer)
        placed.planner.charge(placed.counters, decoding=True)

    def ended(self, payload: bytes | bytearray, nbytes: int) -> int:
        """A device has answered for records of ahead lists; returns how many."""
        records = np.frombuffer(bytearray(payload[:nbytes]), COPY)
        self._placed.planner.ended(records)
        return len(records)

    def settle(self) -> None:
        """Take what storage has reported while nobody waited for a step."""
        self.reads.settle()
        self._cancel()

    def failures(self, layer: int, experts: npt.NDArray[np.int32]) -> list[ReadFailed]:
        """Take storage's reports; returns failed reads of the layer's experts."""
        found = self.reads.failures(layer, experts)
        self._cancel()
        return found

    def _cancel(self) -> None:
        """Tell devices of loads whose bytes will never land."""
        planner = self._placed.planner
        if planner.has_cancelled:
            for link in self._links:
                self.send(link, planner.take_cancelled(link.number))
