"""Where bytes lie, driven by a real residency through random histories."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fomoe.engine.transfers import SegmentSlots
from fomoe.residency import LFRU, LRU, Residency, Topology
from fomoe.types import ExpertKey, Tier

N_LAYERS, N_EXPERTS, SLOT_BYTES = 5, 7, {0: 4096, 1: 12288}


def segment_of(topology, node):
    """As `EnginePlan.segment_slots` lays it out."""
    counts = {}
    for (device, size_class), n in topology.device_slots.items():
        if topology.device_node[device] == node:
            counts[size_class] = counts.get(size_class, 0) + n
    for (where, size_class), n in topology.ram_slots.items():
        if where == node:
            counts[size_class] = counts.get(size_class, 0) + n
    classes = {c: (n, SLOT_BYTES[c]) for c, n in counts.items() if n}
    return SegmentSlots(classes, topology.layer_class, N_EXPERTS)


class History(RuleBasedStateMachine):
    """Carries plans out on slots that remember whose bytes were read into them last."""

    ram = "exclusive"

    @initialize(data=st.data())
    def start(self, data):
        device_node = data.draw(st.sampled_from([(0,), (0, 0), (0, 1)]))
        layer_device = np.arange(N_LAYERS, dtype=np.int32) % len(device_node)
        layer_class = np.array([0, 0, 1, 0, 1], np.int32)
        pools = set(zip(layer_device.tolist(), layer_class.tolist(), strict=True))
        nodes = {(device_node[d], c) for d, c in pools}
        self.topology = Topology(
            n_layers=N_LAYERS, n_experts=N_EXPERTS, layer_device=layer_device,
            layer_class=layer_class, device_node=device_node,
            device_slots={p: data.draw(st.integers(2, 7)) for p in sorted(pools)},
            ram_slots={p: data.draw(st.integers(0, 6)) for p in sorted(nodes)},
        )  # fmt: skip
        policy = data.draw(st.sampled_from([LFRU, LRU]))()
        self.residency = Residency(self.topology, policy, self.ram)
        self.node = [device_node[d] for d in layer_device]
        self.segments = [segment_of(self.topology, n) for n in range(max(device_node) + 1)]
        self.contents = [{} for _ in self.segments]  # slot -> (key, generation)
        if data.draw(st.booleans()):
            keys = [ExpertKey(i, e) for i in range(N_LAYERS) for e in range(N_EXPERTS)]
            placements = self.residency.fill(keys)
            for n, segment in enumerate(self.segments):
                mine = [p for p in placements if self.node[p.key.layer] == n]
                reads = segment.fill(mine)
                assert [r.expert for r in reads] == [p.key for p in mine]
                self.carry_out(n, reads)

    def carry_out(self, node, reads):
        segment, contents = self.segments[node], self.contents[node]
        for read in reads:
            held = segment.classes[int(self.topology.layer_class[read.expert.layer])]
            assert held.first <= read.slot < held.first + held.count
            assert read.address == held.address + (read.slot - held.first) * held.slot_bytes
            before = contents.get(read.slot)
            assert read.generation == (before[1] if before else 0) + 1
            contents[read.slot] = (read.expert, read.generation)

    def is_resident(self, key):
        return bool(self.residency.mask(key.layer)[key.expert])

    def apply(self, plan):
        node = self.node[plan.layer]
        reads = self.segments[node].apply(plan, self.is_resident)
        wanted = [f.expert for f in plan.fetches if f.source == Tier.NVME]
        assert [r.expert for r in reads] == [ExpertKey(plan.layer, e) for e in wanted]
        self.carry_out(node, reads)

    @rule(steps=st.lists(
        st.tuples(
            st.integers(0, N_LAYERS - 1),
            st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=3),
        ),
        min_size=1, max_size=5,
    ))  # fmt: skip
    def step(self, steps):
        """Layers' steps; a new one of a layer waits for the old one."""
        for layer, wanted in steps:
            self.residency.release(layer)
            experts = np.array(sorted(wanted), np.int32)[: self.residency.capacity(layer)]
            self.apply(self.residency.plan(layer, experts))
            self.bytes_are_where_the_tables_say()

    @rule(layer=st.integers(0, N_LAYERS - 1), order=st.permutations(range(N_EXPERTS)),
          limit=st.integers(1, 4), eager=st.booleans())  # fmt: skip
    def look_ahead(self, layer, order, limit, eager):
        candidates = np.array(order[:limit], np.int32)
        self.apply(self.residency.prefetch(layer, candidates, limit, eager=eager))

    @rule(layer=st.integers(0, N_LAYERS - 1))
    def finish(self, layer):
        self.residency.release(layer)

    @rule(data=st.data())
    def fail(self, data):
        """A read failed: the entry goes, wherever it lies."""
        present = [
            ExpertKey(layer, int(e))
            for layer in range(N_LAYERS)
            for e in np.flatnonzero(self.residency.mask(layer))
        ]
        if not present:
            return
        key = data.draw(st.sampled_from(present))
        segment = self.segments[self.node[key.layer]]
        slots, _, generations = segment.locate(key.layer, np.array([key.expert], np.int32))
        assert segment.is_current(key, int(slots[0]), int(generations[0]))
        assert not segment.is_current(key, int(slots[0]), int(generations[0]) + 1)
        assert not segment.is_current(key, int(slots[0]) + 1, int(generations[0]))
        self.residency.forget(key.layer, np.array([key.expert], np.int32))
        segment.forget(key)
        assert not segment.is_current(key, int(slots[0]), int(generations[0]))
        assert slots[0] >= 0

    @invariant()
    def bytes_are_where_the_tables_say(self):
        if not hasattr(self, "segments"):
            return
        self.residency.check_integrity()
        everyone = np.arange(N_EXPERTS, dtype=np.int32)
        for n, segment in enumerate(self.segments):
            used = []
            for layer in (i for i in range(N_LAYERS) if self.node[i] == n):
                resident = self.residency.mask(layer)
                slots, addresses, generations = segment.locate(layer, everyone)
                assert ((slots >= 0) == resident).all()
                for e in np.flatnonzero(resident):
                    # The bytes read last into the slot are this expert's, of this generation.
                    key = ExpertKey(layer, int(e))
                    assert self.contents[n][int(slots[e])] == (key, int(generations[e]))
                    held = segment.classes[int(self.topology.layer_class[layer])]
                    offset = (int(slots[e]) - held.first) * held.slot_bytes
                    assert addresses[e] == held.address + offset
                used += slots[slots >= 0].tolist()
            free = [
                slot
                for first, count in zip(segment.class_first, segment.free_count, strict=True)
                for slot in segment.free_slots[first : first + count].tolist()
            ]
            assert sorted(used + free) == list(range(segment.n_slots))


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
def test_bytes_follow_the_tables(ram):
    machine = type("Machine", (History,), {"ram": ram})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=30, stateful_step_count=25, deadline=None)
    )


def test_addresses_of_two_classes_do_not_touch():
    layer_class = np.array([0, 1], np.int32)
    slots = SegmentSlots({1: (3, 12288), 0: (2, 4096)}, layer_class, 4)
    assert (slots.n_slots, slots.nbytes) == (5, 2 * 4096 + 3 * 12288)
    assert [(c.first, c.address) for c in slots.classes.values()] == [(0, 0), (2, 8192)]


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
def test_a_promoted_expert_leaves_no_slot_behind(ram):
    topology = Topology(
        n_layers=1, n_experts=6, layer_device=np.zeros(1, np.int32), device_node=(0,),
        layer_class=np.zeros(1, np.int32), device_slots={(0, 0): 1}, ram_slots={(0, 0): 2},
    )  # fmt: skip
    residency = Residency(topology, LRU(), ram)
    segment = segment_of(topology, 0)
    segment.fill(residency.fill(ExpertKey(0, e) for e in range(3)))
    # Expert 1 is promoted out of RAM, evicted, and in the end dropped from RAM as well.
    for expert in (1, 3, 4, 5, 0, 2, 1, 3, 4):
        plan = residency.plan(0, np.array([expert], np.int32))
        segment.apply(plan, lambda key: bool(residency.mask(key.layer)[key.expert]))
        residency.release(0)
        slots, _, _ = segment.locate(0, np.arange(6, dtype=np.int32))
        assert ((slots >= 0) == residency.mask(0)).all()
