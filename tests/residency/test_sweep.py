"""Sweeps over random pools, carried out on a mirror of the segment's slots."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.residency import LFRU, LRU, ChunkUse, Residency, Sweep, Topology
from fomoe.residency.sweep import ring_slots, share_slots
from fomoe.types import ExpertKey, Tier

E = 12


def topology(device_slots, ram_slots, n_layers=4, n_classes=1):
    layers = np.arange(n_layers, dtype=np.int32)
    classes = range(n_classes)
    return Topology(
        n_layers=n_layers, n_experts=E, layer_device=layers * 0,
        layer_class=layers % n_classes, device_node=(0,),
        device_slots={(0, c): device_slots for c in classes},
        ram_slots={(0, c): ram_slots for c in classes},
    )  # fmt: skip


def use_of(tokens):
    """The use of a chunk given as a list of sets of experts."""
    experts = sorted(set().union(*tokens))
    return ChunkUse(
        len(tokens), np.array(experts, np.int32),
        np.array([sum(e in t for t in tokens) for e in experts]),
        np.array([max(i for i, t in enumerate(tokens) if e in t) for e in experts]),
    )  # fmt: skip


class Mirror:
    """What lies in the device slots of each pool, as an executor would see it."""

    def __init__(self, residency, n_layers):
        self.residency = residency
        self.n_layers = n_layers
        self.slots = {}
        self.ram = residency.slots(Tier.RAM)

    def follow(self, dropped, placed):
        for key in dropped:
            (slot,) = [s for s, k in self.slots.items() if k == key]
            del self.slots[slot]
        for place in placed:
            pool = tuple(self.residency.members(place.key.layer)), place.slot
            before = self.slots.get(pool)
            assert before is None or self.ram[before.layer, before.expert] >= 0, "given twice"
            assert place.key not in self.slots.values()
            self.slots[pool] = place.key

    def check(self):
        table = self.residency.slots(Tier.DEVICE)
        on_device = {ExpertKey(*map(int, key)) for key in np.argwhere(table >= 0)}
        in_ram = {ExpertKey(*map(int, key)) for key in np.argwhere(self.ram >= 0)}
        assert np.array_equal(self.ram, self.residency.slots(Tier.RAM)), "RAM stays as it is"
        assert on_device <= set(self.slots.values()) <= on_device | in_ram
        self.residency.check_integrity()


def run(residency, mirror, layer, use, data, expected=None):
    """Sweep a layer with waves and turns in any order that is possible; returns its reads."""
    n_layers = mirror.n_layers
    before = residency.tier_of(layer)
    sweep = Sweep(residency, layer, use)
    reads, turns, sizes = [], [], []
    while not sweep.is_done:
        wave = sweep.next_wave(data.draw(st.integers(1, 5)))
        if wave is not None:
            assert wave.first == (sizes[-1] if sizes else 0)
            mirror.follow(wave.dropped, wave.placed)
            reads += [p.key.expert for p in wave.placed]
            sizes.append(wave.end)
            turns.append(wave.end)
            mirror.check()
        if turns and (wave is None or data.draw(st.booleans())):
            end = turns.pop(0)
            started = turns[0] if turns else end
            assert (residency.tier_of(layer)[use.experts[end:started]] != Tier.NVME).all()
            sweep.computed(end)
        else:
            assert wave is not None, "nothing is under way and nothing can begin"
        if expected is not None:
            guess = sweep.guess((layer + 1) % n_layers, expected)
            mirror.follow(guess.dropped, guess.placed)
            ids = [p.key.expert for p in guess.placed]
            assert ids == sorted(ids)
            assert all(expected[i] for i in ids)
            mirror.check()
    assert reads == sorted(set(reads)), "in file order, each once"
    wanted = set(use.experts.tolist())
    absent = {e for e in wanted if before[e] == Tier.NVME}
    assert absent <= set(reads) <= wanted
    return sweep, reads


chunks = st.lists(st.sets(st.integers(0, E - 1), min_size=2, max_size=2), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), slots=st.integers(2, 4 * E), ram=st.integers(0, 8),
       n_classes=st.sampled_from([1, 2]), ram_policy=st.sampled_from(["exclusive", "inclusive"]),
       policy=st.sampled_from([LRU(), LFRU()]))  # fmt: skip
def test_each_expert_once_in_order(data, slots, ram, n_classes, ram_policy, policy):
    t = topology(min(slots, 4 // n_classes * E), ram, n_classes=n_classes)
    residency = Residency(t, policy, ram_policy)
    mirror = Mirror(residency, 4)
    filled = residency.fill(ExpertKey(la, e) for la in range(4) for e in range(E))
    mirror.follow((), [place for place in filled if place.tier == Tier.DEVICE])
    mirror.ram = residency.slots(Tier.RAM)
    for layer in list(range(4)) * 2:
        use = use_of(data.draw(chunks))
        mask = data.draw(st.sets(st.integers(0, E - 1)))
        expected = np.isin(np.arange(E), list(mask)) if data.draw(st.booleans()) else None
        sweep, _ = run(residency, mirror, layer, use, data, expected)
        mirror.check()
        assert sweep.kept.sum() <= share_slots(residency, layer, use.tokens)
        kept = use.experts[sweep.kept]
        assert (residency.tier_of(layer)[kept] != Tier.NVME).all()


def test_what_fits_is_read_once_for_all():
    residency = Residency(topology(4 * E, 0), LFRU())
    mirror = Mirror(residency, 4)
    use = use_of([{0, 5}, {3, 11}])
    assert ring_slots(residency, 0, 1024) == 0
    assert _reads(residency, mirror, 0, use) == [0, 3, 5, 11]
    for layer in (1, 2, 3):
        _reads(residency, mirror, layer, use_of([set(range(E))]))
    assert _reads(residency, mirror, 0, use) == []
    assert residency.counters.evictions.sum() == 0


def test_the_tail_stays():
    """With LRU the caches hold what the last tokens used, not the highest ids."""
    residency = Residency(topology(8, 0, n_layers=1), LRU())
    mirror = Mirror(residency, 1)
    share = share_slots(residency, 0, 6)
    assert share == 4
    tokens = [{10, 11}, {8, 9}, {6, 7}, {4, 5}, {2, 3}, {0, 1}]
    sweep, reads = _sweep(residency, mirror, 0, use_of(tokens))
    assert reads == list(range(E))
    assert sweep.experts[sweep.kept].tolist() == [0, 1, 2, 3]
    assert (residency.tier_of(0)[:4] == Tier.DEVICE).all()


def test_the_history_is_that_of_tokens_one_by_one():
    one, other = (Residency(topology(E, 0, n_layers=1), LFRU()) for _ in range(2))
    tokens = [{0, 3}, {3, 5}, {1, 3}, {0, 1}, {3, 7}]
    for token in tokens:
        one.plan(0, np.array(sorted(token), np.int32))
        one.release(0)
    Sweep(other, 0, use_of(tokens))
    assert np.array_equal(one.worth(0), other.worth(0))


def test_a_wrong_guess_leaves_first():
    residency = Residency(topology(6, 0, n_layers=2), LRU())
    mirror = Mirror(residency, 2)
    expected = np.isin(np.arange(E), [1, 2, 3])
    sweep, _ = _sweep(residency, mirror, 0, use_of([{0, 1}, {2, 3}]))
    guess = sweep.guess(1, expected)
    mirror.follow(guess.dropped, guess.placed)
    assert [p.key.expert for p in guess.placed] == [1, 2, 3]
    _sweep(residency, mirror, 1, use_of([{2, 9}, {2, 10}, {2, 11}]))
    used, wasted = residency.counters.prefetch_used, residency.counters.prefetch_wasted
    assert (used[1], wasted[1]) == (1, 2)


def _sweep(residency, mirror, layer, use):
    sweep, reads = Sweep(residency, layer, use), []
    while not sweep.is_done:
        wave = sweep.next_wave(3)
        mirror.follow(wave.dropped, wave.placed)
        reads += [p.key.expert for p in wave.placed]
        sweep.computed(wave.end)
    mirror.check()
    return sweep, reads


def _reads(residency, mirror, layer, use):
    return _sweep(residency, mirror, layer, use)[1]


def test_a_short_prompt_needs_a_small_ring():
    residency = Residency(
        Topology(
            n_layers=2, n_experts=512, layer_device=np.zeros(2, np.int32),
            layer_class=np.zeros(2, np.int32), device_node=(0,), device_slots={(0, 0): 400},
            ram_slots={},
        ),
        LFRU(),
    )  # fmt: skip
    rings = [ring_slots(residency, 0, tokens) for tokens in (1, 128, 256, 1024, 4096)]
    assert rings == [16, 16, 32, 128, 128]
    shares = [share_slots(residency, 0, tokens) for tokens in (1, 256, 1024)]
    assert shares == [192, 184, 136]
