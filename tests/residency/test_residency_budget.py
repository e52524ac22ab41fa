"""Budgets to slots: bounds, proportions and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import BudgetError, ConfigError
from fomoe.residency import LRU, ExpertSizes, Residency, plan_budgets


@st.composite
def sizes_and_k(draw):
    n_layers, n_experts = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    n_devices, n_classes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    node = st.integers(0, 1)
    many = {"min_size": n_layers, "max_size": n_layers}
    classes = draw(st.lists(st.integers(0, n_classes - 1), **many))
    devices = draw(st.lists(st.integers(0, n_devices - 1), **many))
    sizes = ExpertSizes(
        n_experts=n_experts,
        slot_bytes=tuple(draw(st.lists(st.integers(1, 5), min_size=n_classes, max_size=n_classes))),
        layer_class=np.array(classes, dtype=np.int32),
        layer_device=np.array(devices, dtype=np.int32),
        device_node=tuple(draw(st.lists(node, min_size=n_devices, max_size=n_devices))),
    )
    return sizes, draw(st.integers(1, n_experts))


def classes_of(sizes, device):
    return np.unique(sizes.layer_class[sizes.layer_device == device]).tolist()


def least_bytes(sizes, top_k):
    return [
        sum(top_k * sizes.slot_bytes[c] for c in classes_of(sizes, device))
        for device in range(len(sizes.device_node))
    ]


@given(sizes_and_k(), st.data())
def test_slots_stay_within_budgets_and_experts(case, data):
    sizes, top_k = case
    vram = [least + data.draw(st.integers(0, 400)) for least in least_bytes(sizes, top_k)]
    ram = [data.draw(st.integers(0, 400)) for _ in range(2)]
    rule = data.draw(st.sampled_from(["exclusive", "inclusive"]))
    topology = plan_budgets(
        sizes, vram_budget_bytes=vram, ram_budget_bytes=ram, top_k=top_k, ram=rule
    )
    experts = {}
    for device, budget in enumerate(vram):
        mine = {c: n for (d, c), n in topology.device_slots.items() if d == device}
        assert sorted(mine) == classes_of(sizes, device)
        used = sum(sizes.slot_bytes[c] * n for c, n in mine.items())
        assert used <= budget
        for c, n in mine.items():
            here = (sizes.layer_device == device) & (sizes.layer_class == c)
            whole = int(here.sum()) * sizes.n_experts
            assert top_k <= n <= whole
            # What is left over is less than one slot of any class that is not whole.
            assert n == whole or budget - used < len(mine) * max(sizes.slot_bytes)
            pool = sizes.device_node[device], c
            experts[pool] = experts.get(pool, 0) + whole - (n if rule == "exclusive" else 0)
    for node, budget in enumerate(ram):
        mine = {c: n for (at, c), n in topology.ram_slots.items() if at == node}
        assert sum(sizes.slot_bytes[c] * n for c, n in mine.items()) <= budget
        assert all(0 <= n <= experts[node, c] for c, n in mine.items())
    residency = Residency(topology, LRU(), rule)
    for layer in range(len(sizes.layer_class)):
        assert residency.capacity(layer) >= top_k
        residency.plan(layer, np.arange(top_k, dtype=np.int32))
        residency.release(layer)


@given(sizes_and_k())
def test_the_least_budget_works_and_one_byte_less_does_not(case):
    sizes, top_k = case
    least = least_bytes(sizes, top_k)
    plan_budgets(sizes, vram_budget_bytes=least, ram_budget_bytes=[0, 0], top_k=top_k)
    for device, needed in enumerate(least):
        if needed:
            short = [n - (d == device) for d, n in enumerate(least)]
            with pytest.raises(BudgetError, match=f"device {device}") as refused:
                plan_budgets(sizes, vram_budget_bytes=short, ram_budget_bytes=[0, 0], top_k=top_k)
            assert refused.value.needed_bytes == needed
            assert refused.value.given_bytes == needed - 1


def desktop(layers_per_class=(20, 10)):
    return ExpertSizes(
        n_experts=512,
        slot_bytes=(7 << 20, 8 << 20),
        layer_class=np.repeat(np.arange(2, dtype=np.int32), layers_per_class),
        layer_device=np.zeros(sum(layers_per_class), dtype=np.int32),
        device_node=(0,),
    )


def test_each_class_holds_the_same_share():
    topology = plan_budgets(
        desktop(), vram_budget_bytes=[12 << 30], ram_budget_bytes=[8 << 30], top_k=10
    )
    shares = [topology.device_slots[0, c] / (512 * n) for c, n in ((0, 20), (1, 10))]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    assert topology.device_slots[0, 0] == pytest.approx((12 << 10) * 2 / 22, rel=1e-3)
    assert sum(topology.ram_slots.values()) > 1000


def test_a_small_class_still_gets_top_k():
    topology = plan_budgets(
        desktop((29, 1)), vram_budget_bytes=[100 * (7 << 20)], ram_budget_bytes=[0], top_k=10
    )
    assert topology.device_slots[0, 1] == 10
    assert topology.device_slots[0, 0] == (700 - 80) // 7


def test_a_budget_for_everything_holds_everything_once():
    sizes = desktop()
    budgets = {"vram_budget_bytes": [1 << 40], "ram_budget_bytes": [1 << 40], "top_k": 10}
    exclusive = plan_budgets(sizes, **budgets)
    assert exclusive.device_slots == {(0, 0): 20 * 512, (0, 1): 10 * 512}
    assert set(exclusive.ram_slots.values()) == {0}
    inclusive = plan_budgets(sizes, **budgets, ram="inclusive")
    assert inclusive.ram_slots == exclusive.device_slots


@pytest.mark.parametrize(
    ("vram", "ram", "top_k"),
    [([], [0], 1), ([1 << 40], [], 1), ([1 << 40], [-1], 1), ([1 << 40], [0], 513)],
)
def test_inputs_that_do_not_match_are_refused(vram, ram, top_k):
    with pytest.raises(ConfigError):
        plan_budgets(desktop(), vram_budget_bytes=vram, ram_budget_bytes=ram, top_k=top_k)
