"""What GPUs host and what that leaves for experts; no device is asked."""

from dataclasses import replace

import numpy as np
import pytest
from support.tiny_gguf import write_tiny

from fomoe.config import Budgets, EngineConfig, RoutingConfig
from fomoe.engine import hosting
from fomoe.engine.plan import FREE_BYTES, HOSTED_CHUNK, VRAM_RESERVE_BYTES, make_plan, resolve
from fomoe.errors import BudgetError, ConfigError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.gpu.host import planned_bytes, resident_bytes

GIB = 1 << 30


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """File, table and spec of a small model of five layers."""
    path = write_tiny(tmp_path_factory.mktemp("m") / "m.gguf", layers=5, experts=6, top_k=2)
    file = open_gguf(path)
    spec = read_spec(file)
    return file, ExpertTable.from_gguf(file, spec.n_layers), spec


def config(file, *devices, vram=None, **options):
    return EngineConfig(
        model=file.path, devices=devices or ("cuda:0",), budgets=Budgets(vram_bytes=vram), **options
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_layer_has_one_host_and_the_ends_theirs(read, n):
    file, _, spec = read
    hosts = hosting.host_options(config(file, *["hip:0"] * n, prefill_chunk=32), spec)
    assert sorted(layer for host in hosts for layer in host.layers) == list(range(5))
    assert [host.embedding for host in hosts] == [0 in host.layers for host in hosts]
    assert [host.head for host in hosts] == [4 in host.layers for host in hosts]
    assert {host.max_tokens for host in hosts} == {32}


def test_the_driver_takes_the_dense_part_of_the_devices_that_have_the_experts(read):
    file, _, spec = read
    split = config(file, "hip:0", "hip:1", prefill_chunk=32, attention="driver", vram=GIB)
    experts, dense = hosting.host_options(split, spec), hosting.driver_options(split, spec)
    assert [e.layers for e in experts] == [d.layers for d in dense] == [(0, 2, 4), (1, 3)]
    assert {e.part for e in experts} == {"experts"}
    assert not any(e.embedding or e.head or e.ahead for e in experts)
    assert [(d.part, d.embedding, d.head) for d in dense] == [
        ("dense", True, True), ("dense", False, False)
    ]  # fmt: skip
    needed = hosting.dense_bytes(file, spec, split)
    both = zip(experts, dense, strict=True)
    assert needed == tuple(sum(planned_bytes(file, spec, half) for half in each) for each in both)
    whole = config(file, "hip:0", "hip:1", prefill_chunk=32)
    assert hosting.driver_options(whole, spec) == ()
    more = np.array(needed) - hosting.dense_bytes(file, spec, whole)
    assert (more > 0).all()  # two processes want more than one, not twice as much
    assert (more < 0.6 * np.array(needed)).all()


def test_a_device_of_two_processes_keeps_two_reserves(read):
    file, table, spec = read
    split = resolve(config(file, attention="driver"), table, spec, GIB, (8 * GIB,))
    assert split.budgets.vram_bytes == 8 * GIB - 2 * VRAM_RESERVE_BYTES


@pytest.mark.parametrize(
    ("routing", "count"),
    [
        (RoutingConfig(), 2),
        (RoutingConfig(shadow_every=0), 1),
        (RoutingConfig(shadow_every=0, quality="kl=0.01"), 2),
        (RoutingConfig(shadow_every=0, quality="price=0.01"), 1),
    ],
)
def test_a_second_state_is_held_where_shadow_steps_may_come(read, routing, count):
    assert hosting.n_states(config(read[0], routing=routing)) == count


def test_the_default_budget_is_what_is_free_less_a_reserve(read):
    file, table, spec = read
    alone = resolve(config(file, "cuda:0", "cuda:1"), table, spec, GIB, (8 * GIB, 6 * GIB))
    ram = sum(table.slot_bytes(i) for i in range(5)) * 6 + FREE_BYTES
    assert alone.budgets == Budgets(vram_bytes=6 * GIB - VRAM_RESERVE_BYTES, ram_bytes=ram)
    shared = resolve(config(file, "cuda:0", "cuda:0"), table, spec, GIB, (8 * GIB, 8 * GIB))
    assert shared.budgets.vram_bytes == 4 * GIB - VRAM_RESERVE_BYTES
    full = resolve(config(file), table, spec, GIB, (1000,))
    assert full.budgets.vram_bytes == 0
    with pytest.raises(BudgetError, match="dense weights"):
        make_plan(table, spec, full, (0,), hosting.dense_bytes(file, spec, full))


@pytest.mark.parametrize(
    ("devices", "switch", "most"),
    [
        (("cuda:0", "cuda:1"), None, None),
        (("hip:0", "hip:1@10.0.0.2"), None, 64 * GIB - GIB - 3 * GIB // 2 - GIB // 4),
        (("hip:0", "hip:1"), "N", (64 * GIB - GIB - 3 * GIB // 2) // 2 - GIB // 4),
        (("hip:0", "hip:1"), "Y", None),
    ],
)
def test_amd_pins_no_more_than_its_driver_lets_all_processes(
    read, tmp_path, monkeypatch, devices, switch, most
):
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr(hosting.os, "sysconf", memory.__getitem__)
    monkeypatch.setattr(hosting, "_AMD_UNLIMITED", tmp_path / "switch")
    if switch is not None:
        (tmp_path / "switch").write_text(switch + "\n")
    assert hosting.most_pinned(config(read[0], *devices, vram=GIB)) == most


def test_the_default_ram_tier_is_what_can_be_pinned(read):
    file, table, spec = read
    given = resolve(config(file, vram=1 << 20), table, spec, GIB, (), 12345)
    assert given.budgets.ram_bytes == 12345


def test_a_chunk_goes_by_the_model_and_not_by_memory(read):
    file, table, spec = read
    chunks = [
        resolve(config(file, vram=vram, ctx_size=8192), table, spec, GIB).prefill_chunk
        for vram in (1 << 20, 1 << 40)
    ]
    assert chunks == [HOSTED_CHUNK, HOSTED_CHUNK]
    assert resolve(config(file, vram=1, ctx_size=77), table, spec, GIB).prefill_chunk == 77
    given = resolve(config(file, vram=1, prefill_chunk=5), table, spec, GIB)
    assert given.prefill_chunk == 5


def test_the_least_budget_that_works_is_named(read):
    file, table, spec = read
    small = resolve(config(file, vram=1 << 30, ctx_size=64), table, spec, GIB)
    dense = hosting.dense_bytes(file, spec, small)
    enough = dense[0] + sum(table.slot_bytes(i) for i in range(5)) * 6
    for vram in (dense[0] + 4 * table.slot_bytes(0), enough - 1):
        given = replace(small, budgets=Budgets(vram_bytes=vram, ram_bytes=0))
        with pytest.raises(BudgetError, match="RAM that experts pass through"):
            make_plan(table, spec, given, (0,), dense)
        given = replace(small, budgets=Budgets(vram_bytes=vram, ram_bytes=1 << 22))
        assert not make_plan(table, spec, given, (0,), dense).on_devices
    held = replace(small, budgets=Budgets(vram_bytes=enough, ram_bytes=0))
    assert make_plan(table, spec, held, (0,), dense).holds_all
    taken = resident_bytes(file, spec, hosting.host_options(small, spec)[0])
    assert dense[0] + taken <= enough  # what is promised is what the device takes


def test_a_gpu_elsewhere_needs_a_budget(read):
    with pytest.raises(ConfigError, match=r"another node.*--vram-budget"):
        hosting.free_vram(config(read[0], "hip:0@desk"))
    assert hosting.free_vram(config(read[0], "hip:0@desk", vram=1 << 30)) == ()
    assert hosting.free_vram(config(read[0], "cpu")) == ()
