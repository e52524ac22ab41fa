"""Single rules of the residency, each on the smallest cache that shows it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError
from fomoe.residency import LFRU, LRU, Fetch, Residency, Topology
from fomoe.types import ExpertKey, Tier


def ids(*experts):
    return np.array(experts, dtype=np.int32)


def one_pool(n_layers=1, device=2, ram=2, n_experts=16):
    zeros = np.zeros(n_layers, dtype=np.int32)
    return Topology(
        n_layers=n_layers,
        n_experts=n_experts,
        layer_device=zeros,
        layer_class=zeros,
        device_slots={(0, 0): device},
        ram_slots={(0, 0): ram},
        device_node=(0,),
    )


def run(residency, layer, *experts):
    plan = residency.plan(layer, ids(*experts))
    residency.release(layer)
    return plan


def test_first_reads_fill_free_slots_from_nvme():
    plan = run(Residency(one_pool(), LRU()), 0, 3, 5)
    assert not plan.hits.size
    assert plan.fetches == (Fetch(3, 0, Tier.NVME), Fetch(5, 1, Tier.NVME))


def test_exclusive_victim_moves_to_ram_and_comes_back_by_exchange():
    residency = Residency(one_pool(), LRU())
    run(residency, 0, 3, 5)
    plan = run(residency, 0, 5, 7)
    assert plan.hits.tolist() == [5]
    assert plan.hit_slots.tolist() == [1]
    assert plan.fetches == (Fetch(7, 0, Tier.NVME, victim=ExpertKey(0, 3), demoted_to=0),)
    plan = run(residency, 0, 3, 7)
    assert plan.fetches == (Fetch(3, 1, Tier.RAM, 0, victim=ExpertKey(0, 5), demoted_to=0),)
    assert residency.tier_of(0)[[3, 7, 5]].tolist() == [Tier.DEVICE, Tier.DEVICE, Tier.RAM]
    assert np.flatnonzero(residency.mask(0)).tolist() == [3, 5, 7]
    assert residency.counters.lookups.tolist() == [[2, 1, 3]]
    assert residency.counters.evictions.tolist() == residency.counters.demotions.tolist() == [2]


def test_inclusive_ram_keeps_a_copy_and_drops_victims():
    residency = Residency(one_pool(), LRU(), "inclusive")
    assert run(residency, 0, 3, 5).fetches == (
        Fetch(3, 0, Tier.NVME, kept_in=0),
        Fetch(5, 1, Tier.NVME, kept_in=1),
    )
    (fetch,) = run(residency, 0, 5, 7).fetches
    assert fetch == Fetch(7, 0, Tier.NVME, victim=ExpertKey(0, 3), kept_in=0)
    (fetch,) = run(residency, 0, 7, 9).fetches
    assert fetch == Fetch(9, 1, Tier.NVME, victim=ExpertKey(0, 5), kept_in=1)
    assert not run(residency, 0, 7, 9).fetches
    assert not residency.counters.demotions.any()


def test_inclusive_hit_in_ram_stays_there():
    residency = Residency(one_pool(device=1, ram=4), LRU(), "inclusive")
    run(residency, 0, 1)
    run(residency, 0, 2)
    (fetch,) = run(residency, 0, 1).fetches
    assert fetch == Fetch(1, 0, Tier.RAM, 0, victim=ExpertKey(0, 2))
    assert residency.slots(Tier.RAM)[0, [1, 2]].tolist() == [0, 1]


def test_a_victim_worth_less_than_all_of_ram_is_dropped():
    residency = Residency(one_pool(device=2, ram=1), LRU())
    run(residency, 0, 1, 2)
    run(residency, 0, 2, 3)  # 1 goes to RAM
    run(residency, 0, 1, 3)  # 1 and 2 exchange: RAM holds 2 (step 2)
    residency.forget(0, ids(1, 3))
    assert residency.fill([ExpertKey(0, 9), ExpertKey(0, 10)])
    plan = run(residency, 0, 4)  # 9 was never used
    assert plan.fetches == (
        Fetch(4, plan.fetches[0].slot, Tier.NVME, victim=ExpertKey(0, 9), demoted_to=-1),
    )
    assert residency.tier_of(0)[2] == Tier.RAM


def test_a_victim_worth_as_much_as_ram_is_dropped_without_a_copy():
    residency = Residency(one_pool(device=2, ram=1), LRU())
    residency.fill([ExpertKey(0, expert) for expert in range(3)])
    (fetch,) = run(residency, 0, 9).fetches
    assert fetch.victim == ExpertKey(0, 0)
    assert fetch.demoted_to == -1


def test_a_layer_below_its_ram_quota_takes_a_slot_whatever_it_holds():
    residency = Residency(one_pool(n_layers=2, device=4, ram=2), LRU())
    for wanted in ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10)):
        run(residency, 0, *wanted)
    assert (residency.tier_of(0) == Tier.RAM).sum() == 2
    run(residency, 1, 1, 2)
    assert not (residency.tier_of(1) == Tier.RAM).any()
    (fetch,) = run(residency, 1, 3).fetches
    assert fetch.victim == ExpertKey(1, 1)
    assert fetch.demoted_to >= 0
    assert (residency.tier_of(0) == Tier.RAM).sum() == 1


def test_inclusive_promotion_counts_as_a_use_of_the_copy():
    residency = Residency(one_pool(device=1, ram=2), LRU(), "inclusive")
    for expert in (1, 2, 1, 3):
        run(residency, 0, expert)
    assert np.flatnonzero(residency.slots(Tier.RAM)[0] >= 0).tolist() == [1, 3]


def test_without_ram_victims_are_dropped():
    residency = Residency(one_pool(ram=0), LRU())
    run(residency, 0, 1, 2)
    (fetch,) = run(residency, 0, 2, 3).fetches
    assert fetch.victim == ExpertKey(0, 1)
    assert fetch.demoted_to == -1


def test_equal_worth_evicts_the_lower_id():
    residency = Residency(one_pool(device=4), LRU())
    run(residency, 0, 2, 4, 6, 8)
    assert {f.victim.expert for f in run(residency, 0, 9, 10).fetches} == {2, 4}


def test_lfru_keeps_the_frequent():
    for policy, victim in ((LRU(), 1), (LFRU(), 2)):
        residency = Residency(one_pool(), policy)
        for wanted in ((1,), (1,), (1,), (1,), (2,), (3,)):
            plan = run(residency, 0, *wanted)
        assert plan.fetches[0].victim == ExpertKey(0, victim)


def test_values_of_the_policies():
    uses, last = np.array([[4, 1, 0]]), np.array([[1, 3, -1]])
    assert LRU().values(uses, last, 3).tolist() == [[1, 3, -1]]
    assert LFRU().values(uses, last, 3).tolist() == [[4 / 3, 1, 0]]


def test_fetches_from_ram_come_first():
    residency = Residency(one_pool(device=3, ram=3), LRU())
    run(residency, 0, 1, 7, 8)
    run(residency, 0, 2, 3, 4)
    plan = run(residency, 0, 5, 6, 7)
    assert [(f.expert, f.source) for f in plan.fetches] == [
        (7, Tier.RAM),
        (5, Tier.NVME),
        (6, Tier.NVME),
    ]


def test_what_comes_from_ram_changes_places_with_the_worthiest_victim():
    residency = Residency(one_pool(device=3, ram=1), LRU())
    for wanted in ((1,), (2,), (3,), (4,)):
        run(residency, 0, *wanted)
    plan = run(residency, 0, 1, 9)
    assert [(f.expert, f.victim.expert, f.demoted_to) for f in plan.fetches] == [
        (1, 3, 0),
        (9, 2, -1),  # used before 3, which has the only slot
    ]


def test_no_victim_moves_to_ram_to_be_dropped_by_the_next():
    residency = Residency(one_pool(device=4, ram=2), LRU())
    for wanted in ((1, 2), (3,), (4,), (5, 6), (7, 8)):
        plan = run(residency, 0, *wanted)
    assert sorted(f.victim.expert for f in plan.fetches) == [3, 4]
    plan = run(residency, 0, 9, 10, 11)
    kept = [f for f in plan.fetches if f.demoted_to >= 0]
    assert [f.victim.expert for f in kept] == [7, 6]
    assert len({f.demoted_to for f in kept}) == 2


def test_quotas_share_a_pool():
    wide = Residency(one_pool(n_layers=3, device=8, ram=0), LRU())
    assert [wide.quota(layer) for layer in range(3)] == [3, 3, 2]
    residency = Residency(one_pool(n_layers=3, device=7, ram=0), LRU())
    assert [residency.quota(layer) for layer in range(3)] == [3, 2, 2]
    run(residency, 0, 1, 2, 3, 4, 5)  # borrows free slots
    run(residency, 1, 1, 2)
    plan = run(residency, 2, 8)  # below its quota: takes from layer 0, which is most over
    assert plan.fetches[0].victim == ExpertKey(0, 1)
    plan = run(residency, 1, 3, 4)  # at its quota: takes its own
    assert {f.victim for f in plan.fetches} == {ExpertKey(1, 1), ExpertKey(1, 2)}
    plan = run(residency, 1, 5, 6, 7)  # own first, then layer 0 again
    assert sorted(f.victim.layer for f in plan.fetches) == [0, 1, 1]
    assert (residency.slots(Tier.DEVICE) >= 0).sum(axis=1).tolist() == [3, 3, 1]


def test_capacity_counts_what_others_hold_back():
    residency = Residency(one_pool(n_layers=2, device=8, ram=0), LRU())
    assert residency.capacity(0) == 8
    residency.plan(0, ids(1, 2))
    assert residency.capacity(1) == residency.capacity(0) == 6
    residency.release(0, ids(1))
    assert residency.capacity(1) == 7
    residency.prefetch(0, ids(3, 4, 5), 3)
    assert residency.capacity(1) == 4
    assert residency.capacity(0) == 7
    residency.release(0)
    assert residency.capacity(1) == 8


def test_a_plan_above_capacity_is_a_bug():
    residency = Residency(one_pool(n_layers=2, ram=0), LRU())
    residency.plan(0, ids(1))
    with pytest.raises(AssertionError, match="capacity"):
        residency.plan(1, ids(1, 2))


@pytest.mark.parametrize("wanted", [(2, 1), (1, 1), (-1, 2)])
def test_wanted_must_ascend(wanted):
    with pytest.raises(AssertionError):
        Residency(one_pool(), LRU()).plan(0, ids(*wanted))


def test_two_plans_of_a_layer_pin_both_waves():
    residency = Residency(one_pool(device=4, ram=0), LRU())
    residency.plan(0, ids(1, 2))
    residency.plan(0, ids(3, 4))
    residency.release(0, ids(1, 2))
    plan = residency.plan(0, ids(5, 6))
    assert {f.victim.expert for f in plan.fetches} == {1, 2}


def test_prefetch_counts_used_and_wasted():
    residency = Residency(one_pool(device=6, ram=0), LRU())
    plan = residency.prefetch(0, ids(5, 6, 7, 8), 4)
    assert [f.expert for f in plan.fetches] == [5, 6, 7]  # half of the pool
    assert not residency.prefetch(0, ids(9), 1).fetches
    run(residency, 0, 5)
    assert residency.counters.prefetch_used.tolist() == [1]
    run(residency, 0, 1, 2, 3, 4)
    run(residency, 0, 1, 2, 3, 4, 5, 9)
    assert residency.counters.prefetch_wasted.tolist() == [2]
    assert residency.counters.prefetches.tolist() == [[0, 0, 3]]


def test_prefetch_spares_what_is_worth_more():
    for eager, expected in ((False, []), (True, [Fetch(9, 0, Tier.NVME, -1, ExpertKey(0, 1))])):
        residency = Residency(one_pool(device=4, ram=0), LRU())
        run(residency, 0, 1, 2)
        run(residency, 0, 3, 4)
        fetches = residency.prefetch(0, ids(9), 1, eager=eager).fetches
        assert list(fetches) == expected


def test_prefetches_from_ram_come_first():
    residency = Residency(one_pool(device=4, ram=2), LRU())
    for wanted in ((1, 2), (3, 4), (5,), (6,)):
        run(residency, 0, *wanted)
    plan = residency.prefetch(0, ids(9, 2), 2, eager=True)
    assert [(f.expert, f.source) for f in plan.fetches] == [(2, Tier.RAM), (9, Tier.NVME)]
    assert residency.counters.prefetches.tolist() == [[0, 1, 1]]


def test_prefetch_never_takes_candidates_or_the_last_plan():
    residency = Residency(one_pool(device=4, ram=0), LRU())
    run(residency, 0, 1, 2)
    run(residency, 0, 3, 4)
    plan = residency.prefetch(0, ids(9, 1, 8, 7), 3, eager=True)
    assert [f.victim for f in plan.fetches] == [ExpertKey(0, 2)]


def test_awaited_entries_wait_for_their_own_layer():
    residency = Residency(one_pool(n_layers=2, device=4, ram=0), LRU())
    residency.prefetch(1, ids(6, 7), 2)
    run(residency, 0, 1, 2)
    run(residency, 0, 3, 4)
    assert np.flatnonzero(residency.mask(1)).tolist() == [6, 7]
    assert run(residency, 1, 6).hits.tolist() == [6]
    run(residency, 0, 1, 2, 3)
    assert np.flatnonzero(residency.mask(1)).tolist() == [6]


def test_fill_takes_device_quota_then_ram_quota():
    residency = Residency(one_pool(n_layers=2, device=3, ram=2, n_experts=4), LRU())
    keys = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
    placed = residency.fill(keys)
    assert [(p.key.layer, p.key.expert, p.tier, p.slot) for p in placed] == [
        (0, 0, Tier.DEVICE, 0),
        (0, 1, Tier.DEVICE, 1),
        (0, 2, Tier.RAM, 0),
        (1, 0, Tier.DEVICE, 2),
        (1, 1, Tier.RAM, 1),
    ]
    assert residency.fill(keys) == []
    assert not residency.counters.lookups.any()


def test_devices_of_one_node_share_its_ram():
    def cache(nodes, ram):
        return Residency(
            Topology(
                n_layers=2,
                n_experts=8,
                layer_device=ids(0, 1),
                layer_class=ids(0, 0),
                device_slots={(0, 0): 2, (1, 0): 2},
                ram_slots=ram,
                device_node=nodes,
            ),
            LRU(),
        )

    shared, apart = cache((0, 0), {(0, 0): 4}), cache((0, 1), {(0, 0): 4})
    for residency in (shared, apart):
        for wanted in ((1, 2), (3, 4), (5, 6)):
            run(residency, 1, *wanted)
    assert np.flatnonzero(shared.tier_of(1) == Tier.RAM).tolist() == [1, 2, 3, 4]
    assert not (apart.tier_of(1) == Tier.RAM).any()


@given(
    st.integers(4, 8),
    st.integers(0, 6),
    st.lists(st.sets(st.integers(0, 15), min_size=1, max_size=4), max_size=40),
)
def test_exclusive_lru_is_one_stack(device, ram, history):
    """The device holds the freshest, RAM the next: sizes of the tiers only cut one order."""
    residency = Residency(one_pool(device=device, ram=ram), LRU())
    last = {}
    for step, wanted in enumerate(history):
        run(residency, 0, *sorted(wanted))
        last |= dict.fromkeys(wanted, step)
        freshest = sorted(last.values(), reverse=True)
        tiers = residency.tier_of(0)
        for tier, steps in (
            (Tier.DEVICE, freshest[:device]),
            (Tier.RAM, freshest[device : device + ram]),
        ):
            found = [last[e] for e in np.flatnonzero(tiers == tier).tolist()]
            assert sorted(found, reverse=True) == steps


def test_a_layer_without_slots_is_refused():
    topology = one_pool()
    with pytest.raises(ConfigError, match="no slot of class 1"):
        Topology(
            n_layers=1,
            n_experts=4,
            layer_device=topology.layer_device,
            layer_class=ids(1),
            device_slots={(0, 0): 1},
            ram_slots={},
            device_node=(0,),
        )
