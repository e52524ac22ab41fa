"""How a prompt's chunk goes through the experts of a layer: each one once, in file order.

A sweep streams the experts that no tier holds through a ring of device slots, ascending by id, and
uses resident ones in place at their turn. What the ring may take is decided here; afterwards the
layer holds the worthiest experts up to its share, which is its quota less its part of the ring.

Unlike a step's plan a sweep pins nothing and moves nothing between tiers: it places experts into
free slots and drops others, and nobody else changes the tables of its pool meanwhile. Where a
device cannot compute in RAM, experts that lie there pass through borrowed slots of its ring.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.residency.plans import Placement
from fomoe.residency.residency import ChunkUse, Residency
from fomoe.types import ExpertKey, Tier

# A ring takes half of its pool, but no more than a drive reads while the dense part of a layer
# computes, which is about one expert in the time of 8 tokens for the models at hand: a slot of the
# ring hides a read in every layer of the pool, a kept expert saves one in a chunk.
RING_TOKENS = 8
RING_MOST = 128
RING_LEAST = 16  # two waves: what reads must find to pass through, where the ring is that large
RESERVE_SHARE = 8  # guesses leave an eighth of a ring

_N_TIERS = len(Tier)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Wave:
    """Experts `first` to `end` of a sweep, which have a place now.

    `dropped` left their slots for it and are nowhere any more; `placed` must be read from the file;
    `borrowed` lie in RAM and have a slot of the device until they are computed.
    """

    first: int
    end: int
    dropped: tuple[ExpertKey, ...]
    placed: tuple[Placement, ...]
    borrowed: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class Guess:
    """Experts of a later layer, to be read when the disk has nothing better to do."""

    dropped: tuple[ExpertKey, ...]
    placed: tuple[Placement, ...]


def ring_slots(residency: Residency, layer: int, tokens: int) -> int:
    """Return how many slots of the layer's pool a chunk may stream through; 0 if all fits."""
    size, n_members = residency.pool_size(layer), len(residency.members(layer))
    absent = residency.n_experts - size // n_members
    if absent <= 0:
        return 0
    useful = max(RING_LEAST, min(RING_MOST, tokens // RING_TOKENS))
    return max(1, min(absent, size // 2, useful))


def share_slots(residency: Residency, layer: int, tokens: int) -> int:
    """Return how many experts the layer keeps on the device after a chunk's sweep."""
    kept = residency.pool_size(layer) - ring_slots(residency, layer, tokens)
    return min(residency.n_experts, kept // len(residency.members(layer)))


class Room:
    """The slots of a layer's pool that can be had: free ones, then those of entries that may leave.

    Own entries leave first, wrong guesses before all, then what other layers hold beyond their
    share; these are looked at when it comes to that.

    Args:
        residency: the tables.
        layer: for whom the slots are.
        keep: bool [E], the layer's experts that stay whatever happens.
        tokens: of the chunk.

    Attributes:
        reserve: slots that guesses leave, so that the first reads behind them can go out at once.
    """

    def __init__(self, residency: Residency, layer: int, keep: Mask, tokens: int) -> None:
        self._residency = residency
        self._layer, self._tokens = layer, tokens
        own = (residency.tier_of(layer) == Tier.DEVICE) & ~keep
        wrong = own & residency.unused(layer)  # guesses that nobody wanted
        self._leaving = deque(_rising(residency, layer, wrong))
        self._leaving.extend(_rising(residency, layer, own & ~wrong))
        self._others = deque(_farthest_first(residency.members(layer), layer))
        self._spared: dict[int, Mask] = {}
        self.reserve = ring_slots(residency, layer, tokens) // RESERVE_SHARE

    @property
    def size(self) -> int:
        """How many slots can be had."""
        while self._others:
            self._look_further()
        return self._residency.free(self._layer) + len(self._leaving)

    def offer(self, key: ExpertKey) -> None:
        """Let an entry leave, after those that may already."""
        self._leaving.append(key)

    def spare(self, layer: int, experts: Mask) -> None:
        """Keep these of the entries that may leave."""
        self._spared[layer] = experts
        self._leaving = deque(
            key for key in self._leaving if key.layer != layer or not experts[key.expert]
        )

    def _look_further(self) -> None:
        """Let another layer's surplus leave."""
        member = self._others.popleft()
        spared = self._spared.get(member)
        self._leaving.extend(
            key
            for key in _surplus(self._residency, member, self._tokens)
            if spared is None or not spared[key.expert]
        )

    def take(
        self, layer: int, expert: int, *, guess: bool = False
    ) -> tuple[Placement, ExpertKey | None] | None:
        """Place an expert of the pool; returns where, and what is nowhere any more for it.

        None without room.
        """
        has_room, gone = self._make_room()
        if not has_room:
            return None
        slot = self._residency.place(layer, expert, guess=guess)
        return Placement(ExpertKey(layer, expert), Tier.DEVICE, slot), gone

    def borrow(self, layer: int, expert: int) -> tuple[Placement, ExpertKey | None] | None:
        """As `take`, of an expert in RAM that stays there."""
        has_room, gone = self._make_room()
        if not has_room:
            return None
        slot = self._residency.borrow(layer)
        return Placement(ExpertKey(layer, expert), Tier.DEVICE, slot), gone

    def _make_room(self) -> tuple[bool, ExpertKey | None]:
        """Free a slot unless one is free; returns whether one is now, and who is nowhere for it."""
        gone = None
        while not self._residency.free(self._layer):
            while not self._leaving and self._others:
                self._look_further()
            if not self._leaving:
                return False, None
            gone = self._leaving.popleft()
            # It may have been forgotten since, because its read failed, or stay in RAM.
            if not self._residency.holds(gone) or self._residency.evict(gone):
                gone = None
        return True, gone


class Sweep:
    """One chunk's way through one layer.

    Args:
        residency: the tables.
        layer: index of the layer.
        use: what the chunk wants.
        borrows: whether experts in RAM need a slot of the device, too.

    Attributes:
        experts: int32 [n], what the chunk wants, ascending.
        sources: int8 [n], the `Tier` that each comes from.
        kept: bool [n], whether it stays after its turn.
    """

    def __init__(
        self, residency: Residency, layer: int, use: ChunkUse, *, borrows: bool = False
    ) -> None:
        self.layer = layer
        self._borrows = borrows
        self._borrowed: deque[tuple[int, int]] = deque()  # position and slot, in order
        self.experts = use.experts
        self._tokens = use.tokens
        self._residency = residency
        tiers, guessed = residency.tier_of(layer), residency.unused(layer)[use.experts]
        residency.observe(layer, use)
        wanted = np.zeros(residency.n_experts, np.bool_)
        wanted[use.experts] = True
        keep = self._choose(tiers, wanted)
        self.sources = tiers[use.experts]
        self.kept = keep[use.experts]
        self._placed = self._computed = 0
        self._room = Room(residency, layer, keep | wanted, use.tokens)
        self._vacated: list[ExpertKey] = []
        self._vacate(int(np.count_nonzero(guessed)))

    @property
    def is_placed(self) -> bool:
        """Whether every expert has had a place."""
        return self._placed == len(self.experts)

    @property
    def is_done(self) -> bool:
        """Whether every expert has been computed."""
        return self._computed == len(self.experts)

    def next_wave(self, most: int, reads: int | None = None) -> Wave | None:
        """Find a place for up to `most` of the next experts; None as long as there is none.

        Not more than `reads` of them are read from the file.
        """
        first = self._placed
        placed: list[Placement] = []
        borrowed: list[Placement] = []
        dropped, self._vacated = self._vacated, []
        end = min(first + most, len(self.experts))
        for at in (first + self._is_absent()[first:end].nonzero()[0]).tolist():
            expert, in_ram = int(self.experts[at]), self.sources[at] == Tier.RAM
            taken = None
            if in_ram:
                taken = self._room.borrow(self.layer, expert)
            elif len(placed) != reads:
                taken = self._room.take(self.layer, expert)
            if taken is None:
                end = at
                break
            (borrowed if in_ram else placed).append(taken[0])
            if in_ram:
                self._borrowed.append((at, taken[0].slot))
            if taken[1] is not None:
                dropped.append(taken[1])
        self._placed = end
        if end == first:
            self._vacated = dropped  # without room for a read they are still to be told of
            assert reads == 0 or not dropped, "what was dropped makes room"
            return None
        lookups = self._residency.counters.lookups[self.layer]
        lookups += np.bincount(self.sources[first:end], minlength=_N_TIERS)
        return Wave(first, end, tuple(dropped), tuple(placed), tuple(borrowed))

    def computed(self, end: int) -> None:
        """The experts before position `end` have had their turn: what is not kept may leave."""
        turn = slice(self._computed, end)
        passing = ~self.kept[turn] & (self.sources[turn] != Tier.RAM)
        for expert in self.experts[turn][passing].tolist():
            self._room.offer(ExpertKey(self.layer, expert))
        self._computed = end
        self._give_back(end)

    def abandon(self) -> None:
        """End early: nothing computes in slots of this sweep any more."""
        self._give_back(len(self.experts))

    def _give_back(self, end: int) -> None:
        while self._borrowed and self._borrowed[0][0] < end:
            self._residency.give_back(self.layer, self._borrowed.popleft()[1])

    def _is_absent(self) -> Mask:
        """Return bool [n]: the experts that need a slot of the device."""
        absent: Mask = self.sources == Tier.NVME
        return absent | (self.sources == Tier.RAM) if self._borrows else absent

    def guess(self, layer: int, expected: Mask, most: int | None = None) -> Guess:
        """Place experts of a later layer that it will probably want, ascending, in what is left.

        Not more than `most`. Where that layer shares this one's pool, nothing is placed before this
        one needs no more.
        """
        if layer not in self._residency.members(self.layer):
            return guess_ahead(self._residency, layer, expected, self._tokens, most)
        if not self.is_placed:
            return Guess((), ())
        self._room.spare(layer, expected)
        return _guess(self._residency, self._room, layer, expected, most)

    def _choose(self, tiers: npt.NDArray[np.int8], wanted: Mask) -> Mask:
        """Choose what the layer holds on its device after the sweep, bool [E]."""
        candidates = (tiers == Tier.DEVICE) & ~self._residency.unused(self.layer)
        candidates |= wanted & (tiers != Tier.RAM)
        share = share_slots(self._residency, self.layer, self._tokens)
        return _worthiest(self._residency.worth(self.layer), candidates, share)

    def _vacate(self, n_guessed: int) -> None:
        """Give up resident experts whose turn comes late where reads were to wait without.

        Slots that reads pass through: what can be had at first, and what earlier experts leave
        behind, less what earlier reads stay in. Guesses that came true pass through already.
        """
        if not self._is_absent().any():
            return
        ring = min(ring_slots(self._residency, self.layer, self._tokens), RING_LEAST) - n_guessed
        while True:
            reads = self._is_absent()
            passing = (self.sources == Tier.DEVICE) & ~self.kept
            slots = self._room.size + np.cumsum(passing) - np.cumsum(reads & self.kept)
            short = np.flatnonzero(reads & (slots < max(ring, 1)))
            late = passing.nonzero()[0][-1:]
            if not len(short) or not len(late) or late[0] < short[0]:
                return
            key = ExpertKey(self.layer, int(self.experts[late[0]]))
            if not self._residency.evict(key):
                self._vacated.append(key)
            self.sources[late[0]] = self._residency.tier_of(self.layer)[key.expert]


def guess_ahead(
    residency: Residency, layer: int, expected: Mask, tokens: int, most: int | None = None
) -> Guess:
    """Place experts, bool [E], that a chunk of `tokens` will probably want of the layer, ascending.

    Not more than `most`. No sweep of the layer's pool may be under way. The layer's worthiest stay
    where they are.
    """
    held = residency.tier_of(layer) == Tier.DEVICE
    kept = _worthiest(residency.worth(layer), held, share_slots(residency, layer, tokens))
    room = Room(residency, layer, kept | expected, tokens)
    return _guess(residency, room, layer, expected, most)


def _guess(residency: Residency, room: Room, layer: int, expected: Mask, most: int | None) -> Guess:
    absent = expected & (residency.tier_of(layer) == Tier.NVME)
    placed, dropped = [], []
    for expert in absent.nonzero()[0][:most].tolist():
        taken = room.take(layer, expert, guess=True) if room.size > room.reserve else None
        if taken is None:
            break
        placed.append(taken[0])
        if taken[1] is not None:
            dropped.append(taken[1])
    return Guess(tuple(dropped), tuple(placed))


def _worthiest(worth: npt.NDArray[np.float64], candidates: Mask, most: int) -> Mask:
    """Choose up to `most` candidates of the greatest worth, at equal worth the higher id."""
    ids = candidates.nonzero()[0]
    best = ids[np.argsort(worth[ids], kind="stable")][max(0, len(ids) - most) :]
    chosen = np.zeros_like(candidates)
    chosen[best] = True
    return chosen


def _rising(residency: Residency, layer: int, which: Mask) -> list[ExpertKey]:
    """List experts of a layer by rising worth, the lower id first at a tie."""
    ids = which.nonzero()[0]
    order = ids[np.argsort(residency.worth(layer)[ids], kind="stable")]
    return [ExpertKey(layer, expert) for expert in order.tolist()]


def _surplus(residency: Residency, layer: int, tokens: int) -> list[ExpertKey]:
    """List what a layer holds beyond its share, the least worthy first."""
    held = residency.tier_of(layer) == Tier.DEVICE
    over = max(0, int(np.count_nonzero(held)) - share_slots(residency, layer, tokens))
    return _rising(residency, layer, held)[:over]


def _farthest_first(members: list[int], layer: int) -> list[int]:
    """Order the other layers by when their next turn comes in a run of chunks, the last first."""
    at = members.index(layer)
    return members[:at][::-1] + members[at + 1 :][::-1]
