import dataclasses
import math

import pytest
from support.small_machine import make_loads, small_shape

from fomoe.errors import ConfigError
from fomoe.sim.decode import decode
from fomoe.sim.machine import read_machine
from fomoe.sim.measured import Measurements, machine_of, machine_toml, solve_read_time
from fomoe.sim.schedule import Schedule

MEASURED = Measurements(
    model="m.gguf", day="2026-11-28", devices=2, ram_bytes=16e9, free_bytes=12e9,
    memory_rate=30e9, dense_rate=20e9, expert_rate=18e9, matrix_rate=1e11, drive_rate=1.5e9,
    drive_latency_s=2e-4, layer_s=3e-5, token_s=4e-4, reads_s=5e-5,
)  # fmt: skip


def test_the_file_says_what_the_machine_is(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text(machine_toml(MEASURED))
    read, made = read_machine(path), machine_of(MEASURED)
    assert read.is_measured
    for part in ("host", "devices", "drives", "software", "network", "nodes"):
        assert getattr(read, part) == getattr(made, part)
    assert "m.gguf" in read.sources["device0.expert_rate"]


def test_any_name_of_a_model_can_be_read_again(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text(machine_toml(dataclasses.replace(MEASURED, model='a "b" \\ 😀.gguf')))
    assert read_machine(path).title.endswith('a "b" \\ 😀.gguf')


@pytest.mark.parametrize("reads_s", [0.0, 7e-5, 9e-4])
def test_what_reads_take_besides_is_found_again(reads_s):
    shape, loads = small_shape(), make_loads()
    machine = machine_of(dataclasses.replace(MEASURED, reads_s=reads_s))
    speed = decode(machine, shape, loads, Schedule()).tokens_per_s
    assert solve_read_time(MEASURED, shape, loads, speed) == pytest.approx(reads_s, abs=2e-6)


@pytest.mark.parametrize("wrong", [math.inf, math.nan, -1.0])
def test_refuses_what_was_not_measured(wrong):
    with pytest.raises(ConfigError, match="dense_rate"):
        dataclasses.replace(MEASURED, dense_rate=wrong)
