"""Random histories of a residency, carried out on a mirror of the memories."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fomoe.residency import LFRU, LRU, Residency, Topology
from fomoe.types import ExpertKey, Tier

N_LAYERS, N_EXPERTS = 4, 6


class Memories:
    """Slots that hold keys; carries plans out the way an executor would."""

    def __init__(self, topology, is_exclusive):
        self.is_exclusive = is_exclusive
        self.device_pool = topology.device_pools()
        self.ram_pool = topology.ram_pools()
        self.device = {pool: [None] * n for pool, n in topology.device_slots.items()}
        self.ram = {pool: [None] * n for pool, n in topology.ram_slots.items()}

    def slots(self, tier, layer):
        if tier == Tier.DEVICE:
            return self.device[self.device_pool[layer]]
        return self.ram.get(self.ram_pool[layer], [])

    def carry_out(self, plan):
        slots = self.slots(Tier.DEVICE, plan.layer)
        for expert, slot in zip(plan.hits, plan.hit_slots, strict=True):
            assert slots[slot] == ExpertKey(plan.layer, expert)
        for fetch in plan.fetches:
            self._fetch(plan.layer, fetch)

    def _fetch(self, layer, fetch):
        slots, ram = self.slots(Tier.DEVICE, layer), self.slots(Tier.RAM, layer)
        key = ExpertKey(layer, fetch.expert)
        assert slots[fetch.slot] == fetch.victim
        assert (fetch.source == Tier.RAM) == (fetch.ram_slot >= 0)
        if fetch.ram_slot >= 0:
            assert ram[fetch.ram_slot] == key
            if self.is_exclusive:
                ram[fetch.ram_slot] = None
        if fetch.demoted_to >= 0:
            ram[fetch.demoted_to] = slots[fetch.slot]
        slots[fetch.slot] = key
        if fetch.kept_in >= 0:
            ram[fetch.kept_in] = key


class ResidencyMachine(RuleBasedStateMachine):
    """Plans, prefetches, releases and failed reads in any order on tiny pools."""

    ram = "exclusive"
    n_devices = 1
    n_classes = 1

    @initialize(data=st.data())
    def start(self, data):
        count = st.integers(1, 8)
        layers = np.arange(N_LAYERS, dtype=np.int32)
        # Pairs of layers share a class, so that each device has layers of each class.
        layer_device = layers % self.n_devices
        layer_class = (layers // 2) % self.n_classes
        pools = {(d, c) for d in range(self.n_devices) for c in range(self.n_classes)}
        nodes = tuple(data.draw(st.sampled_from([(0, 0), (0, 1)]))[: self.n_devices])
        self.topology = Topology(
            n_layers=N_LAYERS,
            n_experts=N_EXPERTS,
            layer_device=layer_device,
            layer_class=layer_class,
            device_slots={pool: data.draw(count) for pool in sorted(pools)},
            ram_slots={
                (n, c): data.draw(st.integers(0, 5)) for n in set(nodes) for _, c in sorted(pools)
            },
            device_node=nodes,
        )
        policy = data.draw(st.sampled_from([LRU(), LFRU()]))
        self.is_lru = isinstance(policy, LRU)
        self.residency = Residency(self.topology, policy, self.ram)
        self.memories = Memories(self.topology, self.ram == "exclusive")
        self.pinned, self.awaited, self.last_wanted = set(), set(), {}
        self.last_used = {}
        self.steps = [0] * N_LAYERS

    @precondition(lambda self: not any(self.steps))
    @rule(order=st.permutations(range(N_LAYERS * N_EXPERTS)), n=st.integers(0, 24))
    def fill(self, order, n):
        keys = [ExpertKey(*divmod(i, N_EXPERTS)) for i in order[:n]]
        for placed in self.residency.fill(keys):
            slots = self.memories.slots(placed.tier, placed.key.layer)
            assert slots[placed.slot] is None
            slots[placed.slot] = placed.key

    @rule(layer=st.integers(0, N_LAYERS - 1), wanted=st.sets(st.integers(0, N_EXPERTS - 1)))
    def plan(self, layer, wanted):
        wanted = sorted(wanted)[: self.residency.capacity(layer)]
        blocked = self.pinned | {key for key in self.awaited if key.layer != layer}
        before, copies = (self.residency.slots(tier) for tier in (Tier.DEVICE, Tier.RAM))
        plan = self.residency.plan(layer, np.array(wanted, dtype=np.int32))
        self.memories.carry_out(plan)
        self.steps[layer] += 1
        assert sorted([*plan.hits.tolist(), *(f.expert for f in plan.fetches)]) == wanted
        assert (self.residency.slots(Tier.DEVICE)[layer, wanted] >= 0).all()
        keys = {ExpertKey(layer, e) for e in wanted}
        for fetch in plan.fetches:
            assert fetch.victim is None or fetch.victim not in blocked | keys
        self._check_victims_are_own(layer, plan, before, blocked | keys)
        self._check_copies_are_kept(copies, blocked | keys)
        self.awaited -= {key for key in self.awaited if key.layer == layer}
        self.pinned |= keys
        self.last_wanted[layer] = keys
        self.last_used |= dict.fromkeys(keys, self.steps[layer])

    def _check_victims_are_own(self, layer, plan, before, blocked):
        """Another layer gives a slot only to one below its quota or with nothing of its own."""
        held = int((before[layer] >= 0).sum())
        own = {ExpertKey(layer, int(e)) for e in np.flatnonzero(before[layer] >= 0)} - blocked
        for fetch in plan.fetches:
            if fetch.victim and fetch.victim.layer == layer:
                own.discard(fetch.victim)
        foreign = sum(1 for f in plan.fetches if f.victim and f.victim.layer != layer)
        if own:
            assert foreign <= max(0, self.residency.quota(layer) - held)

    def _check_copies_are_kept(self, before, keys):
        """An inclusive tier keeps the copies of what is in use or awaited."""
        after = self.residency.slots(Tier.RAM)
        for key in keys:
            if self.ram == "inclusive" and before[key.layer, key.expert] >= 0:
                assert after[key.layer, key.expert] == before[key.layer, key.expert]

    @rule(
        layer=st.integers(0, N_LAYERS - 1),
        candidates=st.lists(st.integers(0, N_EXPERTS - 1), unique=True),
        limit=st.integers(0, 4),
        eager=st.booleans(),
    )
    def prefetch(self, layer, candidates, limit, eager):
        capacity = [self.residency.capacity(other) for other in range(N_LAYERS)]
        ids = np.array(candidates, dtype=np.int32)
        copies = self.residency.slots(Tier.RAM)
        plan = self.residency.prefetch(layer, ids, limit, eager=eager)
        self.memories.carry_out(plan)
        fetched = {ExpertKey(layer, fetch.expert) for fetch in plan.fetches}
        self._check_copies_are_kept(copies, self.pinned | self.awaited | fetched)
        assert not plan.hits.size
        assert len(plan.fetches) <= limit
        protected = self.pinned | self.awaited | {ExpertKey(layer, e) for e in candidates}
        protected = protected.union(*self.last_wanted.values())
        for fetch in plan.fetches:
            key = ExpertKey(layer, fetch.expert)
            assert fetch.victim is None or fetch.victim not in protected
            if fetch.victim and self.is_lru and not eager:
                assert self.last_used.get(fetch.victim, -1) <= self.last_used.get(key, -1)
            self.awaited.add(key)
        for other, had in enumerate(capacity):
            assert self.residency.capacity(other) >= had - len(plan.fetches)

    @rule(layer=st.integers(0, N_LAYERS - 1))
    def release(self, layer):
        self.residency.release(layer)
        self.pinned = {key for key in self.pinned if key.layer != layer}
        self.awaited = {key for key in self.awaited if key.layer != layer}

    @rule(layer=st.integers(0, N_LAYERS - 1), expert=st.integers(0, N_EXPERTS - 1))
    def forget(self, layer, expert):
        for tier in (Tier.DEVICE, Tier.RAM):
            slot = self.residency.slots(tier)[layer, expert]
            if slot >= 0:
                self.memories.slots(tier, layer)[slot] = None
        self.residency.forget(layer, np.array([expert], dtype=np.int32))
        key = ExpertKey(layer, expert)
        self.pinned.discard(key)
        self.awaited.discard(key)
        assert self.residency.tier_of(layer)[expert] == Tier.NVME

    @rule()
    def release_all(self):
        for layer in range(N_LAYERS):
            self.release(layer)
            pool = self.memories.device_pool[layer]
            others = [k for k in self.pinned if self.memories.device_pool[k.layer] == pool]
            if not others and not self.awaited:
                assert self.residency.capacity(layer) == self.topology.device_slots[pool]

    @invariant()
    def memories_hold_what_the_tables_say(self):
        if not hasattr(self, "residency"):
            return
        self.residency.check_integrity()
        for tier in (Tier.DEVICE, Tier.RAM):
            table = self.residency.slots(tier)
            for layer, expert in np.argwhere(table >= 0).tolist():
                slot = table[layer, expert]
                assert self.memories.slots(tier, layer)[slot] == ExpertKey(layer, expert)
        for layer in range(N_LAYERS):
            tiers = self.residency.tier_of(layer)
            np.testing.assert_array_equal(self.residency.mask(layer), tiers != Tier.NVME)
        device = self.residency.slots(Tier.DEVICE)
        assert all(device[key.layer, key.expert] >= 0 for key in self.pinned | self.awaited)
        if self.ram == "exclusive":
            assert not ((device >= 0) & (self.residency.slots(Tier.RAM) >= 0)).any()


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("n_classes", [1, 2])
def test_random_histories(ram, n_devices, n_classes):
    attributes = {"ram": ram, "n_devices": n_devices, "n_classes": n_classes}
    machine = type("Machine", (ResidencyMachine,), attributes)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )
