"""Budgets to slots to segments: refusals that name what works, and equal plans everywhere."""

from dataclasses import replace

import numpy as np
import pytest
from support.tiny_gguf import write_tiny

from fomoe.actors.layout import StepArena
from fomoe.config import Budgets, EngineConfig, RoutingConfig
from fomoe.engine.chunk import CHUNK_SHARE, LEAST_CHUNK, MOST_CHUNK, auto_chunk, token_bytes
from fomoe.engine.fill import fill_order
from fomoe.engine.plan import DEFAULT_SHARE, default_budgets, make_plan, resolve
from fomoe.errors import BudgetError, ConfigError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.layers import DenseModel
from fomoe.residency import LFRU, Residency
from fomoe.types import ExpertKey


@pytest.fixture(scope="module")
def read(model_path):
    file = open_gguf(model_path)
    spec = read_spec(file)
    return ExpertTable.from_gguf(file, spec.n_layers), spec


def config(vram, ram, *, devices=1, **options):
    return EngineConfig(
        model="m.gguf", devices=("cpu",) * devices,
        budgets=Budgets(vram_bytes=vram, ram_bytes=ram), **options,
    )  # fmt: skip


def whole(table, spec):
    return sum(table.slot_bytes(i) for i in range(spec.n_layers)) * spec.moe.n_experts


@pytest.mark.parametrize("boxes", [(0,), (0, 0, 0), (0, 1), (0, 1, 0)])
def test_the_refused_budget_names_one_that_works(read, boxes):
    table, spec = read

    def plan(vram):
        return make_plan(table, spec, config(vram, 0, devices=len(boxes)), boxes)

    with pytest.raises(BudgetError) as refusal:
        plan(1000)
    needed = refusal.value.needed_bytes
    with pytest.raises(BudgetError):
        plan(needed - 1)
    slots = plan(needed).topology.device_slots
    assert all(n >= spec.moe.top_k for n in slots.values())


def test_slots_fit_the_budgets_and_never_exceed_the_experts(read):
    table, spec = read
    total = whole(table, spec)
    sizes = [c.slot_bytes for c in table.classes]
    for vram, ram, boxes in ((total // 5, total // 9, (0,)), (total // 4, total // 3, (0, 1, 0)),
                             (total, total, (0, 0)), (2 * total, 0, (0, 1))):  # fmt: skip
        plan = make_plan(table, spec, config(vram, ram, devices=len(boxes)), boxes)
        t = plan.topology
        for device in range(len(boxes)):
            used = sum(n * sizes[c] for (d, c), n in t.device_slots.items() if d == device)
            assert used <= vram
        for node in range(max(boxes) + 1):
            used = sum(n * sizes[c] for (m, c), n in t.ram_slots.items() if m == node)
            assert used <= ram
        device, ram_used = plan.slot_bytes()
        assert device + ram_used <= total
        assert device == sum(n * sizes[c] for (_, c), n in t.device_slots.items())
        segments = [plan.segment_slots(node) for node in range(max(boxes) + 1)]
        assert sum(s.nbytes for s in segments) == device + ram_used
        assert sum(s.n_slots for s in segments) == sum(t.device_slots.values()) + sum(
            t.ram_slots.values()
        )


def test_layers_go_round_the_devices(read):
    table, spec = read
    plan = make_plan(table, spec, config(1 << 24, 0, devices=3), (0, 0, 1))
    assert plan.topology.layer_device.tolist() == [i % 3 for i in range(spec.n_layers)]
    assert plan.topology.device_node == (0, 0, 1)


def test_equal_inputs_give_equal_plans(read, model_path):
    table, spec = read
    again = ExpertTable.from_dict(table.to_dict())
    options = config(whole(table, spec) // 6, whole(table, spec) // 8, devices=2)
    first = make_plan(table, spec, options, (0, 1))
    second = make_plan(again, spec, EngineConfig.from_dict(options.to_dict()), (0, 1))
    a, b = first.topology, second.topology
    assert a.device_slots == b.device_slots
    assert list(a.device_slots) == list(b.device_slots)
    assert a.ram_slots == b.ram_slots
    assert np.array_equal(a.layer_class, b.layer_class)
    assert first.logical_capacity == second.logical_capacity
    assert first.text() == second.text()
    for node in (0, 1):
        one, two = first.segment_slots(node), second.segment_slots(node)
        assert one.classes == two.classes
        assert (one.n_slots, one.nbytes) == (two.n_slots, two.nbytes)


def test_the_text_tells_where_the_experts_are(read):
    table, spec = read
    total = whole(table, spec)
    text = make_plan(table, spec, config(total // 4, total // 4), (0,)).text()
    plan = make_plan(table, spec, config(total // 4, total // 4), (0,))
    experts = spec.n_layers * spec.moe.n_experts
    on_device = sum(plan.topology.device_slots.values())
    in_ram = sum(plan.topology.ram_slots.values())
    assert f"{experts} in {spec.n_layers} layers" in text
    assert f"{on_device} slots" in text
    assert f"{in_ram} slots" in text
    assert f"{experts - on_device - in_ram} experts" in text
    assert "nvme     0 experts" in make_plan(table, spec, config(total, 0), (0,)).text()


def test_budgets_must_be_resolved_first(read):
    with pytest.raises(ConfigError, match="resolved"):
        make_plan(*read, config(None, 0), (0,))


def test_a_backfill_that_the_logical_cache_cannot_hold_is_refused(read):
    """Before any actor starts, which would find out when it makes a sequence."""
    routing = RoutingConfig(car_capacity=4, backfill="2")
    with pytest.raises(ConfigError, match="6 background reads under way do not fit"):
        make_plan(*read, config(1 << 24, 0, routing=routing), (0,))


def test_a_loss_profile_of_another_model_is_refused(read):
    _, spec = read
    for layers in (spec.n_layers - 1, spec.n_layers + 1):
        routing = RoutingConfig(sensitivities=(1.0,) * layers)
        with pytest.raises(ConfigError, match=f"{layers} layers, the model {spec.n_layers}"):
            make_plan(*read, config(1 << 30, 0, routing=routing), (0,))


class TestLogicalCapacity:
    def plan(self, read, capacity, share=5):
        table, spec = read
        total = whole(table, spec)
        options = config(
            total // share, 0, routing=RoutingConfig(quality="car=0.5", car_capacity=capacity)
        )
        return make_plan(table, spec, options, (0,))

    def test_an_explicit_one_is_taken(self, read):
        assert self.plan(read, 7).logical_capacity == 7

    def test_otherwise_it_is_what_the_budgets_hold(self, read):
        table, spec = read
        total = whole(table, spec)
        plan = make_plan(table, spec, config(total // 4, total // 8), (0,))
        slots = sum(plan.topology.device_slots.values()) + sum(plan.topology.ram_slots.values())
        assert plan.logical_capacity == slots // spec.n_layers
        everything = make_plan(table, spec, config(total, total), (0,))
        assert everything.logical_capacity == spec.moe.n_experts

    def test_it_never_is_below_top_k(self, read):
        table, spec = read
        with pytest.raises(BudgetError) as refusal:
            make_plan(table, spec, config(0, 0), (0,))
        least = make_plan(table, spec, config(refusal.value.needed_bytes, 0), (0,))
        assert least.logical_capacity == spec.moe.top_k

    @pytest.mark.parametrize("capacity", [2, 17])
    def test_one_that_cannot_work_is_refused(self, read, capacity):
        with pytest.raises(ConfigError, match=rf"{capacity}.*choose 3 to 16"):
            self.plan(read, capacity)


class TestResolve:
    def test_explicit_budgets_stay(self, read):
        given = replace(config(123, 456), prefill_chunk=77)
        assert resolve(given, *read, free_bytes=1) is given

    def test_missing_ones_come_from_free_memory(self, read):
        table, spec = read
        total = whole(table, spec)
        got = resolve(config(None, None, devices=2), table, spec, free_bytes=total // 2)
        assert got.budgets.vram_bytes == int(total // 2 * DEFAULT_SHARE) // 2
        assert got.budgets.ram_bytes == 0  # a cpu device's tiers are one memory
        one = resolve(config(777, None), table, spec, free_bytes=total)
        assert one.budgets == Budgets(vram_bytes=777, ram_bytes=0)
        assert resolve(got, table, spec, free_bytes=1) is got

    def test_plenty_of_memory_holds_every_expert_and_no_more(self, read):
        table, spec = read
        for devices in (1, 2, 3, 7):
            vram, _ = default_budgets(table, spec, devices, 1 << 40)
            plan = make_plan(table, spec, config(vram, 0, devices=devices), (0,) * devices)
            assert sum(plan.topology.device_slots.values()) == spec.n_layers * spec.moe.n_experts

    def test_lossy_text_does_not_depend_on_free_memory(self, read):
        table, spec = read
        total = whole(table, spec)
        got = {
            resolve(config(None, None), table, spec, free).routing.car_capacity
            for free in (total // 3, total, 1 << 40)
        }
        assert got == {max(spec.moe.top_k, spec.moe.n_experts // 6)}
        asked = replace(config(None, None), routing=RoutingConfig(car_capacity=9))
        assert resolve(asked, table, spec, total).routing.car_capacity == 9


class TestChunk:
    def test_a_given_one_stays_and_a_missing_one_is_resolved(self, read):
        assert resolve(config(123, 456), *read, free_bytes=1).prefill_chunk == LEAST_CHUNK
        given = replace(config(123, 456), prefill_chunk=77)
        assert resolve(given, *read, free_bytes=1).prefill_chunk == 77

    def test_its_buffers_fit_the_share(self, read):
        _, spec = read
        for budget in (1 << 25, 1 << 26, 1 << 27):
            chunk = auto_chunk(spec, 1 << 20, 1, budget)
            assert LEAST_CHUNK < chunk < MOST_CHUNK
            assert chunk * token_bytes(spec, 1) <= budget // CHUNK_SHARE
            assert (chunk + 32) * token_bytes(spec, 1) > budget // CHUNK_SHARE
            assert auto_chunk(spec, 1 << 20, 2, budget) < chunk

    def test_its_bounds(self, read):
        _, spec = read
        assert auto_chunk(spec, 1 << 20, 1, 0) == LEAST_CHUNK
        assert auto_chunk(spec, 1 << 20, 1, 1 << 50) == MOST_CHUNK
        assert auto_chunk(spec, 100, 1, 1 << 50) == 100

    def test_what_the_model_allocates_is_counted(self, read, tmp_path):
        """The arrays of driver and device; the kernels' own buffers come on top of them."""
        _, spec = read
        file = open_gguf(write_tiny(tmp_path / "m.gguf", layers=4, experts=16, top_k=3))
        sizes = []
        for tokens in (256, 512):
            model = DenseModel(file, read_spec(file), tokens, int8=True)
            sizes.append(buffer_bytes(model))
        arena = StepArena(256, spec.hidden, 3, 16).nbytes / 256
        real = (sizes[1] - sizes[0]) / 256 + arena
        assert real < token_bytes(read_spec(file), 1) < real * 1.5


def buffer_bytes(thing, seen=None):
    """Bytes of all arrays that an object holds, however deep."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, np.ndarray):
        return thing.nbytes if thing.base is None else buffer_bytes(thing.base, seen)
    inner = list(thing.values()) if isinstance(thing, dict) else []
    inner += list(thing) if isinstance(thing, (list, tuple)) else []
    inner += list(getattr(thing, "__dict__", {}).values())
    inner += [getattr(thing, name, None) for name in getattr(thing, "__slots__", ())]
    return sum(buffer_bytes(each, seen) for each in inner)


def test_filling_follows_the_file(read):
    table, spec = read
    plan = make_plan(table, spec, config(whole(table, spec) // 3, 0), (0,))
    keys = list(fill_order(plan.topology))
    assert keys == [ExpertKey(i, e) for i in range(spec.n_layers) for e in range(16)]
    placements = Residency(plan.topology, LFRU()).fill(iter(keys))
    assert len(placements) == sum(plan.topology.device_slots.values())
    starts = [table.extents(p.key.layer, p.key.expert)[0].offset for p in placements]
    assert starts == sorted(starts)


def test_size_classes_lie_one_behind_the_other(tmp_path):
    # Float experts beside quantised ones: slots of very different size share one budget.
    path = write_tiny(tmp_path / "m.gguf", layers=3, experts=8, top_k=2, quant="Q4_K_F16")
    file = open_gguf(path)
    spec = read_spec(file)
    table = ExpertTable.from_gguf(file, spec.n_layers)
    assert len(table.classes) == 2
    total = whole(table, spec)
    plan = make_plan(table, spec, config(total // 3, total // 6), (0,))
    segment = plan.segment_slots(0)
    spans = [(c.address, c.address + c.count * c.slot_bytes) for c in segment.classes.values()]
    assert spans[0][1] == spans[1][0]
    assert spans[-1][1] == segment.nbytes
