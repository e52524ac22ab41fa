"""The physical cache of experts: tables of two tiers, changed by plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.residency._residency import Planner
from fomoe.residency.plans import Placement, Plan, PlanArrays
from fomoe.residency.policy import EvictionPolicy
from fomoe.residency.state import State
from fomoe.residency.topology import RamPolicy, Topology
from fomoe.types import ExpertKey, Tier


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
    sequences: it may change speed, never the text. The rules are native code on the arrays of
    `State`; `fomoe.residency.reference` has them in Python.

    Attributes:
        counters: totals per layer; live, copy them before keeping.
        native: the rules, for callers that want a plan as the arrays of `last_plan`.
        last_plan: where the last plan stands until the next one.
    """

    def __init__(
        self, topology: Topology, policy: EvictionPolicy, ram: RamPolicy = "exclusive"
    ) -> None:
        self._state = State.empty(topology)
        self._policy = policy
        self._is_exclusive = ram == "exclusive"
        self._followed: npt.NDArray[np.bool_] | None = None  # native rules read its memory
        self.counters = self._state.counters
        self.last_plan = PlanArrays(topology.n_experts)
        self.native = Planner(self._state, self.last_plan, policy, self._is_exclusive)

    def plan(
        self, layer: int, wanted: npt.NDArray[np.int32],
        in_ram: npt.NDArray[np.int32] | None = None,
    ) -> Plan:  # fmt: skip
        """Bring the wanted experts onto the layer's device and pin them until `release`.

        Args:
            layer: index of the MoE layer.
            wanted: int32 [n], ascending and distinct, n <= `capacity(layer)`.
            in_ram: int32 [m], distinct, none of them in `wanted`: experts that are wanted as well
                and computed where they lie, in RAM. They move nowhere, and the plan puts nothing
                in their place.

        Returns:
            Hits, and fetches: those from RAM first, each group ascending by expert.

        Raises:
            AssertionError: the ids are not ascending, or more than `capacity` allows; or one of
                `in_ram` is not there.
        """
        n = self.native.plan(
            layer, np.ascontiguousarray(wanted, dtype=np.int32),
            None if in_ram is None else np.ascontiguousarray(in_ram, dtype=np.int32),
        )  # fmt: skip
        return self.last_plan.plan(layer, len(wanted) - n, n)

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
        guesses = np.ascontiguousarray(candidates, dtype=np.int32)
        n = self.native.prefetch(layer, guesses, limit, eager)
        return self.last_plan.plan(layer, 0, n)

    def follow(self, resident: npt.NDArray[np.bool_] | None) -> None:
        """Keep what decisions take as resident, so that they cost the reads that they counted.

        Args:
            resident: bool [L, E], of the sequence that decodes; read whenever something must
                leave, as it is then. An expert of it leaves after all others, and for a prefetch
                never. None: nothing is kept.
        """
        self.native.follow(resident)
        self._followed = resident  # the last one may go only now

    def release(self, layer: int, experts: npt.NDArray[np.int32] | None = None) -> None:
        """Unpin the layer's entries, or only these; nothing of them is awaited any more."""
        if experts is None:
            self.native.release(layer)
        else:
            self.native.release_some(layer, np.ascontiguousarray(experts, dtype=np.int32))

    def observe(self, layer: int, use: ChunkUse) -> None:
        """Count a chunk's use as if its tokens had been planned one by one; pins nothing."""
        history, flags, experts = self._state.history, self._state.flags, use.experts
        before = int(history.steps[layer])
        history.steps[layer] = before + use.tokens
        history.uses[layer, experts] += use.pairs
        history.last[layer, experts] = before + 1 + use.last
        flags.awaited[layer] = False
        flags.n_awaited[layer] = 0
        unused = flags.unused[layer]
        self.counters.prefetch_used[layer] += np.count_nonzero(unused[experts])
        unused[experts] = False
        flags.last_wanted[layer] = False
        flags.last_wanted[layer, experts[use.last == use.tokens - 1]] = True

    def place(self, layer: int, expert: int, *, guess: bool = False) -> int:
        """Put an expert that no tier holds into a free device slot; returns the slot."""
        slot = self._state.device.take(layer)
        self._state.device.assign(layer, expert, slot)
        if guess:
            self._state.flags.unused[layer, expert] = True
            self.counters.prefetches[layer, Tier.NVME] += 1
        return slot

    def holds(self, key: ExpertKey) -> bool:
        """Whether the expert is on its device."""
        return bool(self._state.device.slot_of[key.layer, key.expert] >= 0)

    def device_slot(self, key: ExpertKey) -> int:
        """Return the expert's slot in its device's pool, -1 for none."""
        return int(self._state.device.slot_of[key.layer, key.expert])

    def is_in_ram(self, key: ExpertKey) -> bool:
        """Whether the RAM tier holds the expert, on the device or not."""
        return bool(self._state.ram.slot_of[key.layer, key.expert] >= 0)

    def ram_free(self, layer: int) -> int:
        """Return the number of free slots in the layer's RAM pool."""
        return self._state.ram.free(layer)

    def evict(self, key: ExpertKey) -> bool:
        """Free the device slot of an entry; returns whether a copy in RAM stays."""
        self._state.device.give_up(key.layer, key.expert)
        flags = self._state.flags
        if flags.unused[key.layer, key.expert]:
            flags.unused[key.layer, key.expert] = False
            self.counters.prefetch_wasted[key.layer] += 1
        flags.pinned[key.layer, key.expert] = flags.awaited[key.layer, key.expert] = False
        flags.recount()
        self.counters.evictions[key.layer] += 1
        return bool(self._state.ram.slot_of[key.layer, key.expert] >= 0)

    def drop_demoted(self, key: ExpertKey) -> None:
        """Drop a victim that the last plan demoted, because its bytes find no place in RAM."""
        self.native.drop_demoted(key.layer, key.expert)

    def borrow(self, layer: int) -> int:
        """Return a free device slot of the layer's pool that no table knows until `give_back`."""
        return self._state.device.lend(layer)

    def give_back(self, layer: int, slot: int) -> None:
        """Free a slot that was borrowed."""
        self._state.device.take_back(layer, slot)

    def forget(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Drop entries from both tiers, because their bytes never came (a read failed)."""
        self.native.forget(layer, np.ascontiguousarray(experts, dtype=np.int32))

    def recall(self, key: ExpertKey) -> bool:
        """Take an entry from the device whose bytes never came there, where RAM has it as well.

        Returns:
            Whether it does; otherwise nothing has changed.
        """
        return bool(self.native.recall(key.layer, key.expert))

    def fill(self, keys: Iterable[ExpertKey]) -> list[Placement]:
        """Place experts into free slots at the start, the first keys first.

        Each layer fills its device quota, then its RAM quota; keys that find no room or are
        resident are skipped. Nothing counts as a use.

        Returns:
            Where each placed key goes, in the order of `keys`.
        """
        placements = []
        tables = ((Tier.DEVICE, self._state.device), (Tier.RAM, self._state.ram))
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

    def warm(self, frequencies: npt.NDArray[np.float32], tokens: int) -> None:
        """Let the past be so many tokens of a text that wanted experts this often.

        Args:
            frequencies: float32 [L, E], 0 to 1.
            tokens: how much it weighs against what will be used.
        """
        uses = np.rint(frequencies.astype(np.float64) * tokens).astype(np.int64)
        order = np.argsort(-frequencies, axis=1, kind="stable")
        ages = np.argsort(order, axis=1)  # the rank of each expert: rarer ones are older
        for history in (self._state.history, self._state.ram_history):
            history.uses[:] = uses
            history.last[:] = -1 - ages if self._policy.native_rule == "lru" else -1

    def capacity(self, layer: int) -> int:
        """Return how many experts a plan for the layer can hold now.

        All slots of its pool that are not pinned, nor awaited by another layer. A plan beyond
        `quota(layer)` takes slots that other layers filled.
        """
        return self.native.capacity(layer)

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self._state.device.slot_of.shape[1]

    def free(self, layer: int) -> int:
        """Return the number of free slots in the layer's device pool."""
        return self._state.device.free(layer)

    def members(self, layer: int) -> list[int]:
        """Return the layers that share the layer's device pool, itself included, ascending."""
        return self._state.device.sharers(layer)

    def pool_size(self, layer: int) -> int:
        """Return the slots of the layer's device pool."""
        return int(self._state.device.size[layer])

    def worth(self, layer: int) -> npt.NDArray[np.float64]:
        """Return float64 [E]: what the policy thinks each expert of the layer is worth now."""
        history = self._state.history
        return self._policy.values(
            history.uses[layer], history.last[layer], int(history.steps[layer])
        )

    def unused(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return bool [E]: prefetched experts of the layer that nobody has wanted so far."""
        unused: npt.NDArray[np.bool_] = self._state.flags.unused[layer].copy()
        return unused

    def quota(self, layer: int) -> int:
        """Return the layer's fair share of its device pool, in slots."""
        return int(self._state.device.quota[layer])

    def mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return bool [E]: the experts of the layer on the device or in RAM."""
        closest = np.maximum(self._state.device.slot_of[layer], self._state.ram.slot_of[layer])
        mask: npt.NDArray[np.bool_] = closest >= 0
        return mask

    def tier_of(self, layer: int) -> npt.NDArray[np.int8]:
        """Return int8 [E]: the closest `Tier` that holds each expert of the layer."""
        tiers = np.full(self._state.device.slot_of.shape[1], Tier.NVME, dtype=np.int8)
        tiers[self._state.ram.slot_of[layer] >= 0] = Tier.RAM
        tiers[self._state.device.slot_of[layer] >= 0] = Tier.DEVICE
        return tiers

    def slots(self, tier: Tier) -> npt.NDArray[np.int32]:
        """Return a copy of a tier's table, int32 [L, E]: the slot of each expert, -1 for none."""
        assert tier != Tier.NVME, "NVMe has no slots"
        table = self._state.device if tier == Tier.DEVICE else self._state.ram
        return table.slot_of.copy()

    def check_integrity(self) -> None:
        """Assert that tables, slots, pins and counters agree.

        Raises:
            AssertionError: they do not; the residency must not be used any further.
        """
        self._state.device.check()
        self._state.ram.check()
        on_device, flags = self._state.device.slot_of >= 0, self._state.flags
        assert not (self._is_exclusive and (on_device & (self._state.ram.slot_of >= 0)).any())
        for marks in (flags.pinned, flags.awaited, flags.unused):
            assert not (marks & ~on_device).any(), "a flag on an absent expert"
        assert np.array_equal(flags.n_pinned, flags.pinned.sum(axis=1)), "pins are miscounted"
        assert np.array_equal(flags.n_awaited, flags.awaited.sum(axis=1)), "waits are miscounted"
        counters = self.counters
        finished = counters.prefetch_used + counters.prefetch_wasted
        issued = counters.prefetches.sum(axis=1)
        assert np.array_equal(issued, finished + flags.unused.sum(axis=1)), "prefetches got lost"
