"""`fomoe bench --machine`: two runs' figures become a machine that `fomoe plan` reads."""

import pytest
from support.tiny_gguf import write_tiny

from fomoe.cli.machine_file import check_target, measurements, part_of, write_machine
from fomoe.cli.options import ModelOptions
from fomoe.engine.waterfall import PARTS
from fomoe.errors import ConfigError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.sim.decode import decode
from fomoe.sim.loads import assumed_loads
from fomoe.sim.machine import read_machine
from fomoe.sim.measured import machine_of
from fomoe.sim.schedule import Schedule
from fomoe.sim.shapes import shape_of_file


@pytest.fixture
def path(tmp_path):
    return write_tiny(tmp_path / "m.gguf", seed=2, quant="Q4_K_M", layers=2, vocab=300)


def figures_of(path, *, nvme=0, speed=400.0):
    """A run of 2 layers: 1 ms dense, 0.5 experts, 0.1 brain, 0.1 channel, 0.2 rest a token."""
    parts = dict.fromkeys(PARTS, 0.0) | {
        "dense": 1.0, "experts": 0.5, "brain": 0.1, "channel": 0.1, "rest": 0.2,
    }  # fmt: skip
    hits = {"device": 100 - nvme, "ram": 0, "nvme": nvme}
    return {
        "model": str(path), "devices": ["cpu", "cpu"], "rates": {"memory": 3e10, "drive": 1e9},
        "prefill": {"tokens": 64, "parts_ms": parts, "hits": dict(hits, nvme=0)},
        "decode": {"parts_ms": parts, "hits": hits, "tokens_per_s": {"median": speed}},
    }  # fmt: skip


def test_rates_are_bytes_over_times(path):
    shape = shape_of_file(path)
    found = measurements((figures_of(path), None), shape, (1e-3, 2e-4), 8e9)
    assert found.dense_rate == pytest.approx(shape.dense_bytes / 1e-3)
    assert found.expert_rate == pytest.approx(shape.token_expert_bytes / 0.5e-3)
    assert found.drive_rate == pytest.approx(shape.expert_bytes.mean() / 1e-3)
    assert found.layer_s == pytest.approx(0.1e-3)
    assert (found.devices, found.drive_latency_s, found.reads_s) == (2, 2e-4, 0)


def test_the_second_run_says_what_reads_take_besides(path):
    shape, limited = shape_of_file(path), figures_of(path, nvme=30, speed=180.0)
    found = measurements((figures_of(path), limited), shape, (2e-4, 1e-4), 8e9)
    assert found.reads_s > 1e-4
    loads = assumed_loads((0.7, 0.0, 0.3), shape.top_k, shape.n_layers, 200, seed=0)
    again = decode(machine_of(found), shape, loads, Schedule()).tokens_per_s
    assert again == pytest.approx(180.0, rel=0.001)


def test_a_second_run_that_read_nothing_says_nothing_of_reads(path):
    figures = figures_of(path), figures_of(path, speed=100.0)
    assert measurements(figures, shape_of_file(path), (2e-4, 1e-4), 8e9).reads_s == 0


def test_refuses_at_once_what_could_not_be_written(tmp_path):
    check_target(tmp_path / "here.toml", 64)
    with pytest.raises(ConfigError, match="is no directory"):
        check_target(tmp_path / "none" / "here.toml", 64)
    with pytest.raises(ConfigError, match="is a directory"):
        check_target(tmp_path, 64)
    with pytest.raises(ConfigError, match="exact runs: leave --quality"):
        check_target(tmp_path / "here.toml", 64, is_exact=False)
    with pytest.raises(ConfigError, match="generate tokens"):
        check_target(tmp_path / "here.toml", 0)
    with pytest.raises(ConfigError, match="cpu devices, not cuda:0, cuda:1"):
        check_target(tmp_path / "here.toml", 64, ("cuda:0", "cuda:1"))


def test_a_file_is_written_that_can_be_read(path, tmp_path):
    out = tmp_path / "here.toml"
    figures = figures_of(path), figures_of(path, nvme=30, speed=180.0)
    write_machine(out, path, figures, 8e9)
    machine = read_machine(out)
    assert machine.device.shares_cores
    assert machine.n_devices == 2


def test_refuses_a_run_that_read_experts(path):
    with pytest.raises(ConfigError, match="hold all experts"):
        measurements((figures_of(path, nvme=1), None), shape_of_file(path), (1e-3, 0.0), 8e9)


def test_half_of_the_experts_is_half_of_their_slots(path):
    half = part_of(ModelOptions(model=path, devices="cpu,cpu"), 2)
    table = ExpertTable.from_gguf(open_gguf(path))
    slots = sum(c.slot_bytes * len(c.layers) for c in table.classes) * table.n_experts
    assert half.vram_budget == slots // 4
    assert half.ram_budget == 0
