"""Host memory of GPU nodes: what experts pass through, out of the RAM budget, and what is left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_gguf import write_tiny

from fomoe.config import Budgets, EngineConfig
from fomoe.engine.gpu_segment import GpuSegment
from fomoe.engine.plan import make_plan
from fomoe.engine.staging import LEAST_STAGED, plan_staging, staging_bytes
from fomoe.errors import BudgetError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.residency import ExpertSizes

SIZES = ExpertSizes(
    n_experts=12, slot_bytes=(4096, 12288), layer_class=np.array([0, 1, 0, 1, 0], np.int32),
    layer_device=np.array([0, 1, 2, 0, 1], np.int32), device_node=(0, 0, 1),
)  # fmt: skip


@given(top_k=st.integers(1, 4), ram=st.integers(0, 1 << 21))
def test_staging_fits_half_of_the_budget_or_is_the_least(top_k, ram):
    least = LEAST_STAGED * (4096 + 12288)
    if ram < least:
        with pytest.raises(BudgetError) as refusal:
            plan_staging(SIZES, top_k, [ram, 1 << 21])
        assert refusal.value.needed_bytes == least
        return
    staging = plan_staging(SIZES, top_k, [ram, 1 << 21])
    assert set(staging) == {(0, 0), (0, 1), (1, 0)}
    assert all(n >= LEAST_STAGED for n in staging.values())
    assert staging_bytes(SIZES, staging, 0) <= max(least, ram // 2)
    # Devices 0 and 1 serve both classes; node 1 has as much as it wants.
    assert all(staging[0, c] <= 2 * 4 * top_k for c in (0, 1))
    assert staging[1, 0] == min(4 * top_k, 12)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    file = open_gguf(write_tiny(path, layers=4, experts=16, top_k=3, quant="Q4_K_M"))
    spec = read_spec(file)
    return ExpertTable.from_gguf(file, spec.n_layers), spec


def plan_of(read, vram, ram, devices=("cuda:0", "cuda:1")):
    config = EngineConfig(
        model="m.gguf", devices=devices, budgets=Budgets(vram_bytes=vram, ram_bytes=ram)
    )
    return make_plan(*read, config, (0,) * len(devices))


def whole(read):
    table, spec = read
    return sum(table.slot_bytes(i) for i in range(spec.n_layers)) * spec.moe.n_experts


def test_a_segment_is_the_ram_tier_and_the_staging_part(read):
    total = whole(read)
    plan = plan_of(read, total // 5, total // 3)
    table, t, segment = read[0], plan.topology, plan.gpu_segment(0)
    assert isinstance(segment, GpuSegment)
    for (_, c), n in plan.staging.items():
        assert segment.classes[c].count == n + t.ram_slots.get((0, c), 0)
        assert segment.staging[c] == n
    assert segment.nbytes <= total // 3
    assert len(segment.holds) == sum(t.device_slots.values())
    device, ram = plan.slot_bytes()
    assert device + segment.nbytes > segment.nbytes > ram
    for layer in range(t.n_layers):
        for other in range(layer):
            same = t.device_pools()[layer] == t.device_pools()[other]
            assert (segment.pool_first[layer] == segment.pool_first[other]) == same
    staged = sum(n * table.classes[c].slot_bytes for (_, c), n in plan.staging.items())
    assert ram + staged == segment.nbytes
    assert f"staging  {sum(plan.staging.values())} slots" in plan.text()


def test_each_device_has_the_same_slots_as_without_gpus(read):
    total = whole(read)
    gpus = plan_of(read, total // 5, total // 3).topology
    cpus = plan_of(read, total // 5, total // 3, ("cpu", "cpu")).topology
    assert gpus.device_slots == cpus.device_slots
    assert sum(gpus.ram_slots.values()) < sum(cpus.ram_slots.values())


def test_where_the_devices_hold_everything_no_ram_budget_is_needed(read):
    plan = plan_of(read, whole(read), 0)
    assert plan.holds_all
    assert plan.on_devices
    assert all(n >= LEAST_STAGED for n in plan.staging.values())
    with pytest.raises(BudgetError, match="node 0: RAM that experts pass through"):
        plan_of(read, whole(read) // 5, 0)
