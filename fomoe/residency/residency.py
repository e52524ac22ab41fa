"""The physical cache of experts: tables of two tiers, changed by plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.residency.counters import Counters
from fomoe.residency.plans import Fetch, Placement, Plan
from fomoe.residency.policy import EvictionPolicy, History
from fomoe.residency.ram import ExclusiveRam, InclusiveRam, RamTier, Victim
from fomoe.residency.slots import SlotTable, VictimQueue
from fomoe.residency.topology import RamPolicy, Topology
from fomoe.types import ExpertKey, Tier

_Claim = tuple[int, int, Victim]  # expert, device slot, what left the slot and its worth


@dataclass(frozen=True, slots=True, eq=False)
class ChunkUse:
    """What a chunk of `tokens` wants of a layer.

    `experts` int32 [n], ascending and distinct; `pairs` int64 [n], how many tokens want each;
    `last` int64 [n], the index of the last token that does.
    """

    tokens: int
    experts: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]


class Residency:
    """Decides which expert lies in which device or RAM slot, and what leaves for it.

    A plan is applied to the tables at once; carrying it out is the caller's. Shared by all
    sequences: it may change speed, never the text.

    Attributes:
        counters: totals per layer; live, copy them before keeping.
    """

    def __init__(
        self, topology: Topology, policy: EvictionPolicy, ram: RamPolicy = "exclusive"
    ) -> None:
        shape = topology.n_layers, topology.n_experts
        self.counters = Counters.zeros(topology.n_layers)
        self._policy = policy
        self._history = History(*shape)
        self._steps = [0] * topology.n_layers
        self._device = SlotTable(topology.n_experts, topology.device_pools(), topology.device_slots)
        ram_table = SlotTable(topology.n_experts, topology.ram_pools(), topology.ram_slots)
        self._ram: RamTier = (
            ExclusiveRam(ram_table, self.counters)
            if ram == "exclusive"
            else InclusiveRam(ram_table, self.counters, policy)
        )
        self._is_exclusive = ram == "exclusive"
        self._pinned = np.zeros(shape, dtype=np.bool_)
        self._awaited = np.zeros(shape, dtype=np.bool_)  # prefetched for a plan yet to come
        self._unused = np.zeros(shape, dtype=np.bool_)  # prefetched and not wanted so far
        self._last_wanted = np.zeros(shape, dtype=np.bool_)

    def plan(self, layer: int, wanted: npt.NDArray[np.int32]) -> Plan:
        """Bring the wanted experts onto the layer's device and pin them until `release`.

        Args:
            layer: index of the MoE layer.
            wanted: int32 [n], ascending and distinct, n <= `capacity(layer)`.

        Returns:
            Hits, and fetches: those from RAM first, each group ascending by expert.

        Raises:
            AssertionError: the ids are not ascending, or more than `capacity` allows.
        """
        assert not wanted.size or (wanted[0] >= 0 and (wanted[1:] > wanted[:-1]).all()), wanted
        slots = self._device.slot_of[layer][wanted]
        is_hit = slots >= 0
        self._begin(layer, wanted)
        missing = wanted[~is_hit]
        hits = wanted[is_hit]
        self.counters.lookups[layer, Tier.DEVICE] += hits.size
        fetches: tuple[Fetch, ...] = ()
        if missing.size:
            in_ram = self._ram.table.slot_of[layer][missing] >= 0
            n_ram = int(in_ram.sum())
            self.counters.lookups[layer, Tier.RAM] += n_ram
            self.counters.lookups[layer, Tier.NVME] += missing.size - n_ram
            experts = np.concatenate([missing[in_ram], missing[~in_ram]]).tolist()
            fetches = self._move(layer, self._claim(layer, experts))
        return Plan(layer, hits, slots[is_hit], fetches)

    def prefetch(
        self, layer: int, candidates: npt.NDArray[np.int32], limit: int, *, eager: bool = False
    ) -> Plan:
        """Bring expected experts onto the layer's device before they are wanted.

        A victim is never pinned, awaited, a candidate, nor wanted by its own layer's last plan;
        and worth no more than the candidate that it makes room for, unless `eager` says that the
        guess is worth more than the past. What comes is awaited: it leaves neither for a plan nor
        for a prefetch before its layer's next `plan` or `release`. Awaited entries never hold more
        than half of a pool.

        Without `eager` a full LRU cache prefetches almost nothing: what is not on the device was
        used before everything that is.

        Args:
            layer: index of the MoE layer.
            candidates: int32 [n], distinct, most likely first; those on the device are skipped.
            limit: most fetches.
            eager: waive the comparison of worth.

        Returns:
            A plan without hits.
        """
        table = self._device
        allowed = min(limit, table.size[layer] // 2 - self._count(self._awaited, layer))
        row = table.slot_of[layer]
        guesses = np.zeros_like(self._pinned[layer])
        guesses[candidates] = True
        queue = VictimQueue(
            table,
            self._values,
            lambda m: self._keep(m) | self._last_wanted[m] | (guesses if m == layer else False),
        )
        worth = self._values(layer)
        claims: list[_Claim] = []
        for expert in candidates[row[candidates] < 0].tolist():
            if len(claims) >= allowed:
                break
            least = None if table.free(layer) else queue.peek(layer)
            if not table.free(layer) and (
                least is None or (not eager and least[0] > worth[expert])
            ):
                continue
            claims.append((expert, self._claim_slot(layer, least, queue), least))
            self._awaited[layer, expert] = self._unused[layer, expert] = True
        in_ram = self._ram.table.slot_of[layer]
        claims.sort(key=lambda claim: (in_ram[claim[0]] < 0, _falling_worth(claim[2])))
        fetches = self._move(layer, claims)
        for fetch in fetches:
            self.counters.prefetches[layer, fetch.source] += 1
        nothing = np.empty(0, dtype=np.int32)
        return Plan(layer, nothing, nothing, fetches)

    def release(self, layer: int, experts: npt.NDArray[np.int32] | None = None) -> None:
        """Unpin the layer's entries, or only these; nothing of them is awaited any more."""
        which = slice(None) if experts is None else experts
        self._pinned[layer, which] = False
        self._awaited[layer, which] = False

    def observe(self, layer: int, use: ChunkUse) -> None:
        """Count a chunk's use as if its tokens had been planned one by one; pins nothing."""
        before, experts = self._steps[layer], use.experts
        self._steps[layer] = before + use.tokens
        self._history.uses[layer, experts] += use.pairs
        self._history.last[layer, experts] = before + 1 + use.last
        self._awaited[layer] = False
        unused = self._unused[layer]
        self.counters.prefetch_used[layer] += np.count_nonzero(unused[experts])
        unused[experts] = False
        self._last_wanted[layer] = False
        self._last_wanted[layer, experts[use.last == use.tokens - 1]] = True

    def place(self, layer: int, expert: int, *, guess: bool = False) -> int:
        """Put an expert that no tier holds into a free device slot; returns the slot."""
        slot = self._device.take(layer)
        self._device.assign(layer, expert, slot)
        if guess:
            self._unused[layer, expert] = True
            self.counters.prefetches[layer, Tier.NVME] += 1
        return slot

    def holds(self, key: ExpertKey) -> bool:
        """Whether the expert is on its device."""
        return bool(self._device.slot_of[key.layer, key.expert] >= 0)

    def evict(self, key: ExpertKey) -> bool:
        """Free the device slot of an entry; returns whether a copy in RAM stays."""
        self._device.give_up(key.layer, key.expert)
        self._leave(key)
        self._pinned[key.layer, key.expert] = False
        self.counters.evictions[key.layer] += 1
        return bool(self._ram.table.slot_of[key.layer, key.expert] >= 0)

    def forget(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Drop entries from both tiers, because their bytes never came (a read failed)."""
        for expert in experts.tolist():
            for table in (self._device, self._ram.table):
                if table.slot_of[layer, expert] >= 0:
                    table.give_up(layer, expert)
            self._leave(ExpertKey(layer, expert))
        self._pinned[layer, experts] = False

    def fill(self, keys: Iterable[ExpertKey]) -> list[Placement]:
        """Place experts into free slots at the start, the first keys first.

        Each layer fills its device quota, then its RAM quota; keys that find no room or are
        resident are skipped. Nothing counts as a use.

        Returns:
            Where each placed key goes, in the order of `keys`.
        """
        placements = []
        tables = ((Tier.DEVICE, self._device), (Tier.RAM, self._ram.table))
        for key in keys:
            layer, expert = key.layer, key.expert
            if any(table.slot_of[layer, expert] >= 0 for _, table in tables):
                continue
            for tier, table in tables:
                if table.held[layer] < table.quota[layer] and table.free(layer):
                    slot = table.take(layer)
                    table.assign(layer, expert, slot)
                    placements.append(Placement(key, tier, slot))
                    break
        return placements

    def capacity(self, layer: int) -> int:
        """Return how many experts a plan for the layer can hold now.

        All slots of its pool that are not pinned, nor awaited by another layer. A plan beyond
        `quota(layer)` takes slots that other layers filled.
        """
        others = [m for m in self._device.members[layer] if m != layer]
        awaited = int(np.count_nonzero(self._awaited[others]))
        return self._device.size[layer] - self._count(self._pinned, layer) - awaited

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self._device.slot_of.shape[1]

    def free(self, layer: int) -> int:
        """Return the number of free slots in the layer's device pool."""
        return self._device.free(layer)

    def members(self, layer: int) -> list[int]:
        """Return the layers that share the layer's device pool, itself included, ascending."""
        return self._device.members[layer]

    def pool_size(self, layer: int) -> int:
        """Return the slots of the layer's device pool."""
        return self._device.size[layer]

    def worth(self, layer: int) -> npt.NDArray[np.float64]:
        """Return float64 [E]: what the policy thinks each expert of the layer is worth now."""
        return self._values(layer)

    def unused(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return bool [E]: prefetched experts of the layer that nobody has wanted so far."""
        unused: npt.NDArray[np.bool_] = self._unused[layer].copy()
        return unused

    def quota(self, layer: int) -> int:
        """Return the layer's fair share of its device pool, in slots."""
        return self._device.quota[layer]

    def mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return bool [E]: the experts of the layer on the device or in RAM."""
        closest = np.maximum(self._device.slot_of[layer], self._ram.table.slot_of[layer])
        mask: npt.NDArray[np.bool_] = closest >= 0
        return mask

    def tier_of(self, layer: int) -> npt.NDArray[np.int8]:
        """Return int8 [E]: the closest `Tier` that holds each expert of the layer."""
        tiers = np.full(self._device.slot_of.shape[1], Tier.NVME, dtype=np.int8)
        tiers[self._ram.table.slot_of[layer] >= 0] = Tier.RAM
        tiers[self._device.slot_of[layer] >= 0] = Tier.DEVICE
        return tiers

    def slots(self, tier: Tier) -> npt.NDArray[np.int32]:
        """Return a copy of a tier's table, int32 [L, E]: the slot of each expert, -1 for none."""
        assert tier != Tier.NVME, "NVMe has no slots"
        table = self._device if tier == Tier.DEVICE else self._ram.table
        return table.slot_of.copy()

    def check_integrity(self) -> None:
        """Assert that tables, slots, pins and counters agree.

        Raises:
            AssertionError: they do not; the residency must not be used any further.
        """
        self._device.check()
        self._ram.table.check()
        on_device = self._device.slot_of >= 0
        assert not (self._is_exclusive and (on_device & (self._ram.table.slot_of >= 0)).any())
        for flags in (self._pinned, self._awaited, self._unused):
            assert not (flags & ~on_device).any(), "a flag on an absent expert"
        counters = self.counters
        finished = counters.prefetch_used + counters.prefetch_wasted
        issued = counters.prefetches.sum(axis=1)
        assert np.array_equal(issued, finished + self._unused.sum(axis=1)), "prefetches got lost"

    def _begin(self, layer: int, wanted: npt.NDArray[np.int32]) -> None:
        """Start a step: pins, history, and the end of waiting for prefetches."""
        self._steps[layer] += 1
        self._history.touch(layer, wanted, self._steps[layer])
        self._pinned[layer][wanted] = True
        self._awaited[layer] = False
        unused = self._unused[layer]
        self.counters.prefetch_used[layer] += np.count_nonzero(unused[wanted])
        unused[wanted] = False
        last = self._last_wanted[layer]
        last[:] = False
        last[wanted] = True

    def _claim(self, layer: int, experts: list[int]) -> list[_Claim]:
        """Find a device slot for each expert; the worthiest victims meet the first experts."""
        table = self._device
        queue = VictimQueue(table, self._values, self._keep)
        claims: list[tuple[Victim, int]] = []
        for _ in experts:
            least = None if table.free(layer) else queue.peek(layer)
            claims.append((least, self._claim_slot(layer, least, queue)))
        # Those from RAM stand first and swap with their victims, who are thus kept for sure; the
        # rest go down by falling worth, so that none moves to RAM to be dropped by the next.
        claims.sort(key=lambda claim: _falling_worth(claim[0]))
        return [(e, slot, victim) for e, (victim, slot) in zip(experts, claims, strict=True)]

    def _claim_slot(self, layer: int, victim: Victim, queue: VictimQueue) -> int:
        if victim is None:
            assert self._device.free(layer), "no slot can be freed: the plan is above capacity()"
            return self._device.take(layer)
        key = victim[1]
        queue.pop(key)
        self.counters.evictions[key.layer] += 1
        self._leave(key)
        return self._device.take_from(key, layer)

    def _move(self, layer: int, claims: list[_Claim]) -> tuple[Fetch, ...]:
        """Apply claims to both tables."""
        ram = self._ram
        # An inclusive tier keeps what a copy may still be reading; an exclusive one has none.
        queue = ram.queue(self._values, self._keep)
        fetches = []
        for expert, slot, victim in claims:
            key = ExpertKey(layer, expert)
            ram_slot = int(ram.table.slot_of[layer, expert])
            self._device.assign(layer, expert, slot)
            kept_in = -1
            if ram_slot >= 0:
                demoted_to = ram.promote(key, victim, queue, self._steps[layer])
            else:
                demoted_to, kept_in = ram.read(key, victim, queue, self._steps[layer])
            loser = victim[1] if victim else None
            if loser and demoted_to >= 0:
                self.counters.demotions[loser.layer] += 1
            source = Tier.RAM if ram_slot >= 0 else Tier.NVME
            fetches.append(Fetch(expert, slot, source, ram_slot, loser, demoted_to, kept_in))
        return tuple(fetches)

    def _leave(self, key: ExpertKey) -> None:
        """Drop the flags of an entry that left the device."""
        self._awaited[key.layer, key.expert] = False
        if self._unused[key.layer, key.expert]:
            self._unused[key.layer, key.expert] = False
            self.counters.prefetch_wasted[key.layer] += 1

    def _values(self, layer: int) -> npt.NDArray[np.float64]:
        history = self._history
        return self._policy.values(history.uses[layer], history.last[layer], self._steps[layer])

    def _keep(self, layer: int) -> npt.NDArray[np.bool_]:
        keep: npt.NDArray[np.bool_] = self._pinned[layer] | self._awaited[layer]
        return keep

    def _count(self, flags: npt.NDArray[np.bool_], layer: int) -> int:
        return int(np.count_nonzero(flags[self._device.members[layer]]))


def _falling_worth(victim: Victim) -> tuple[float, int]:
    """Sort key: the worthiest victim first, the higher id at a tie, no victim last."""
    return (-victim[0], -victim[1].expert) if victim else (float("inf"), 0)
