"""The rules of `Residency` in Python: the oracle of the native ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.residency.plans import Fetch, Plan
from fomoe.residency.policy import EvictionPolicy
from fomoe.residency.reference.ram import ExclusiveRam, InclusiveRam, RamTier, Victim
from fomoe.residency.reference.victims import VictimQueue
from fomoe.residency.residency import Residency
from fomoe.residency.topology import RamPolicy, Topology
from fomoe.types import ExpertKey, Tier

_Claim = tuple[int, int, Victim]  # expert, device slot, what left the slot and its worth


class ReferenceResidency(Residency):
    """Changes the same state by the same rules, an object per decision."""

    def __init__(
        self, topology: Topology, policy: EvictionPolicy, ram: RamPolicy = "exclusive"
    ) -> None:
        super().__init__(topology, policy, ram)
        state = self._state
        self._device, self._flags, self._history = state.device, state.flags, state.history
        self._ram: RamTier = (
            ExclusiveRam(state.ram, self.counters)
            if ram == "exclusive"
            else InclusiveRam(state.ram, self.counters, policy, state.ram_history)
        )

    def plan(
        self, layer: int, wanted: npt.NDArray[np.int32],
        in_ram: npt.NDArray[np.int32] | None = None,
    ) -> Plan:  # fmt: skip
        """See `Residency.plan`."""
        assert not wanted.size or (wanted[0] >= 0 and (wanted[1:] > wanted[:-1]).all()), wanted
        slots = self._device.slot_of[layer][wanted]
        is_hit = slots >= 0
        self._begin(layer, wanted)
        kept = np.zeros_like(self._flags.pinned[layer])
        if in_ram is not None and in_ram.size:
            kept[in_ram] = True
            self._use_in_ram(layer, in_ram)
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
            fetches = self._move(layer, self._claim(layer, experts), kept)
        self._flags.recount()
        return Plan(layer, hits, slots[is_hit], fetches)

    def prefetch(
        self, layer: int, candidates: npt.NDArray[np.int32], limit: int, *, eager: bool = False
    ) -> Plan:
        """See `Residency.prefetch`."""
        table = self._device
        allowed = min(limit, int(table.size[layer]) // 2 - self._count(self._flags.awaited, layer))
        row = table.slot_of[layer]
        guesses = np.zeros_like(self._flags.pinned[layer])
        guesses[candidates] = True
        queue = VictimQueue(
            table,
            self._values,
            lambda m: (
                self._keep(m)
                | self._flags.last_wanted[m]
                | (guesses if m == layer else False)
                | (False if self._followed is None else self._followed[m])
            ),
            self._followed,
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
            self._flags.awaited[layer, expert] = self._flags.unused[layer, expert] = True
        in_ram = self._ram.table.slot_of[layer]
        claims.sort(key=lambda claim: (in_ram[claim[0]] < 0, _falling_worth(claim[2])))
        fetches = self._move(layer, claims, np.zeros_like(guesses))
        for fetch in fetches:
            self.counters.prefetches[layer, fetch.source] += 1
        self._flags.recount()
        nothing = np.empty(0, dtype=np.int32)
        return Plan(layer, nothing, nothing, fetches)

    def release(self, layer: int, experts: npt.NDArray[np.int32] | None = None) -> None:
        """See `Residency.release`."""
        which = slice(None) if experts is None else experts
        self._flags.pinned[layer, which] = False
        self._flags.awaited[layer, which] = False
        self._flags.recount()

    def forget(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """See `Residency.forget`."""
        for expert in experts.tolist():
            for table in (self._device, self._ram.table):
                if table.slot_of[layer, expert] >= 0:
                    table.give_up(layer, expert)
            self._leave(ExpertKey(layer, expert))
        self._flags.pinned[layer, experts] = False
        self._flags.recount()

    def recall(self, key: ExpertKey) -> bool:
        """See `Residency.recall`."""
        layer, expert = key.layer, key.expert
        tables = self._device, self._ram.table
        if any(table.slot_of[layer, expert] < 0 for table in tables):
            return False
        self._device.give_up(layer, expert)
        self._leave(key)
        self._flags.pinned[layer, expert] = False
        self._flags.recount()
        return True

    def capacity(self, layer: int) -> int:
        """See `Residency.capacity`."""
        others = [m for m in self._device.sharers(layer) if m != layer]
        awaited = int(np.count_nonzero(self._flags.awaited[others]))
        return int(self._device.size[layer]) - self._count(self._flags.pinned, layer) - awaited

    def _begin(self, layer: int, wanted: npt.NDArray[np.int32]) -> None:
        """Start a step: pins, history, and the end of waiting for prefetches."""
        self._history.steps[layer] += 1
        self._history.touch(layer, wanted, self._step(layer))
        self._flags.pinned[layer][wanted] = True
        self._flags.awaited[layer] = False
        unused = self._flags.unused[layer]
        self.counters.prefetch_used[layer] += np.count_nonzero(unused[wanted])
        unused[wanted] = False
        last = self._flags.last_wanted[layer]
        last[:] = False
        last[wanted] = True

    def _use_in_ram(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Count a use of experts that have no slot of the device to pin."""
        assert (self._device.slot_of[layer][experts] < 0).all(), experts
        assert (self._ram.table.slot_of[layer][experts] >= 0).all(), experts
        self._history.touch(layer, experts, self._step(layer))
        self._flags.last_wanted[layer, experts] = True
        self._ram.use(layer, experts, self._step(layer))
        self.counters.lookups[layer, Tier.RAM] += experts.size

    def _claim(self, layer: int, experts: list[int]) -> list[_Claim]:
        """Find a device slot for each expert; the worthiest victims meet the first experts."""
        table = self._device
        queue = VictimQueue(table, self._values, self._keep, self._followed)
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

    def _move(
        self, layer: int, claims: list[_Claim], in_ram: npt.NDArray[np.bool_]
    ) -> tuple[Fetch, ...]:
        """Apply claims to both tables; `in_ram` bool [E] stay in RAM."""
        ram = self._ram
        # An inclusive tier keeps what a copy may still be reading; an exclusive one has none.
        queue = ram.queue(
            self._values,
            lambda m: self._keep(m) | (in_ram if m == layer else False),
            self._followed,
        )
        fetches = []
        for expert, slot, victim in claims:
            key = ExpertKey(layer, expert)
            ram_slot = int(ram.table.slot_of[layer, expert])
            self._device.assign(layer, expert, slot)
            kept_in = -1
            if ram_slot >= 0:
                demoted_to = ram.promote(key, victim, queue, self._step(layer))
            else:
                demoted_to, kept_in = ram.read(key, victim, queue, self._step(layer))
            loser = victim[1] if victim else None
            if loser and demoted_to >= 0:
                self.counters.demotions[loser.layer] += 1
            source = Tier.RAM if ram_slot >= 0 else Tier.NVME
            fetches.append(Fetch(expert, slot, source, ram_slot, loser, demoted_to, kept_in))
        return tuple(fetches)

    def _leave(self, key: ExpertKey) -> None:
        """Drop the flags of an entry that left the device."""
        self._flags.awaited[key.layer, key.expert] = False
        if self._flags.unused[key.layer, key.expert]:
            self._flags.unused[key.layer, key.expert] = False
            self.counters.prefetch_wasted[key.layer] += 1

    def _values(self, layer: int) -> npt.NDArray[np.float64]:
        history = self._history
        return self._policy.values(history.uses[layer], history.last[layer], self._step(layer))

    def _step(self, layer: int) -> int:
        return int(self._history.steps[layer])

    def _keep(self, layer: int) -> npt.NDArray[np.bool_]:
        keep: npt.NDArray[np.bool_] = self._flags.pinned[layer] | self._flags.awaited[layer]
        return keep

    def _count(self, flags: npt.NDArray[np.bool_], layer: int) -> int:
        return int(np.count_nonzero(flags[self._device.sharers(layer)]))


def _falling_worth(victim: Victim) -> tuple[float, int]:
    """Sort key: the worthiest victim first, the higher id at a tie, no victim last."""
    return (-victim[0], -victim[1].expert) if victim else (float("inf"), 0)
