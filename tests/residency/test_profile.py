"""Frequency profiles: bytes there and back, what is refused, and what a warm start holds."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.engine.fill import fill_order, read_profile
from fomoe.errors import ConfigError
from fomoe.residency import (
    LFRU,
    LRU,
    Residency,
    Topology,
    frequencies_of,
    pack_profile,
    parse_profile,
)
from fomoe.types import Tier

L, E = 3, 12
ORIGINAL = Path(__file__).parents[3] / "shared" / "data" / "fomoe-397b.freq"


def frequencies(seed=0):
    rng = np.random.default_rng(seed)
    values = np.round(rng.random((L, E)), 2).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = 0
    return values


@given(st.integers(0, 2**32 - 1))
def test_there_and_back(seed):
    values = frequencies(seed)
    data = pack_profile(values)
    np.testing.assert_array_equal(parse_profile(data, L, E), values)
    assert len(data) == 16 + 8 * np.count_nonzero(values)


def test_the_layout_is_the_originals():
    data = struct.pack("<IIII", 0x46524551, 1, 2, 2)
    data += struct.pack("<HHf", 1, 3, 0.5) + struct.pack("<HHf", 0, 2, 1.0)
    want = np.zeros((2, 4), np.float32)
    want[1, 3], want[0, 2] = 0.5, 1.0
    np.testing.assert_array_equal(parse_profile(data, 2, 4), want)


@pytest.mark.skipif(not ORIGINAL.is_file(), reason="the original's profile is not here")
def test_the_originals_file():
    values = read_profile(ORIGINAL, 60, 512)
    np.testing.assert_allclose(values.sum(axis=1), 10, atol=1e-4)


def damaged():
    good = pack_profile(frequencies())
    entry = struct.pack("<HHf", 0, 0, 0.5)
    return {
        "no header": good[:10],
        "begins with": b"GGUF" + good[4:],
        "its header says": good + b"\0",
        "layers and names": struct.pack("<IIII", 0x46524551, 1, L + 1, 1) + entry,
        "up to 12": struct.pack("<IIII", 0x46524551, 1, L, 1) + struct.pack("<HHf", 0, E, 0.5),
        "outside 0 to 1": struct.pack("<IIII", 0x46524551, 1, L, 1)
        + struct.pack("<HHf", 0, 0, float("nan")),
        "twice": struct.pack("<IIII", 0x46524551, 1, L, 2) + entry + entry,
    }


@pytest.mark.parametrize("problem", damaged())
def test_damage_is_named(problem):
    with pytest.raises(ConfigError, match=problem):
        parse_profile(damaged()[problem], L, E)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.freq: No such file"):
        read_profile(tmp_path / "none.freq", L, E)


def test_counts_become_shares():
    counts = np.array([[3, 0, 1]])
    np.testing.assert_array_equal(frequencies_of(counts, 4), np.float32([[0.75, 0, 0.25]]))


@pytest.mark.parametrize("policy", [LRU, LFRU])
def test_a_warm_start_fills_devices_then_ram_and_keeps_the_frequent(policy):
    zeros = np.zeros(L, np.int32)
    topology = Topology(
        n_layers=L, n_experts=E, layer_device=zeros, layer_class=zeros, device_node=(0,),
        device_slots={(0, 0): 3 * L}, ram_slots={(0, 0): 2 * L},
    )  # fmt: skip
    values = np.random.default_rng(1).permuted(np.tile(np.arange(E), (L, 1)), axis=1) / 20
    values = values.astype(np.float32)
    residency = Residency(topology, policy())
    residency.warm(values, 100)
    residency.fill(fill_order(topology, values))
    for layer, row in enumerate(values):
        order = np.argsort(-row, kind="stable")
        on_device = np.flatnonzero(residency.slots(Tier.DEVICE)[layer] >= 0)
        in_ram = np.flatnonzero(residency.slots(Tier.RAM)[layer] >= 0)
        assert on_device.tolist() == sorted(order[:3].tolist())
        assert in_ram.tolist() == sorted(order[3:5].tolist())
        residency.plan(layer, order[-1:].astype(np.int32))
        assert set(order[:2].tolist()) <= set(np.flatnonzero(residency.mask(layer)).tolist())
        here = np.flatnonzero(residency.slots(Tier.DEVICE)[layer] >= 0)
        assert set(here.tolist()) == {*order[:2].tolist(), int(order[-1])}
        residency.release(layer)
    residency.check_integrity()
