import pytest

from fomoe.errors import ConfigError
from fomoe.sim.machine import find_machine, machine_files, read_machine

SMALL = """
title = "a small one"

[host]
ram_bytes = 8e9
memory_rate = 30e9
[host.source]
ram_bytes = "made up"
memory_rate = "made up"

[[device]]
count = 2
dense_rate = 20e9
expert_rate = 20e9
matrix_rate = 1e12
[device.source]
dense_rate = "made up"
expert_rate = "made up"
matrix_rate = "made up"

[[drive]]
rate = 2e9
[drive.source]
rate = "made up"

[software]
layer_s = 1e-5
[software.source]
layer_s = "made up"
"""


def read(tmp_path, text):
    path = tmp_path / "small.toml"
    path.write_text(text)
    return read_machine(path)


@pytest.mark.parametrize("name", sorted(machine_files()))
def test_every_machine_that_comes_along_is_complete(name):
    machine = find_machine(name)
    assert machine.name == name
    assert machine.sources
    assert all(machine.sources.values())


def test_the_four_machines_are_there():
    wanted = {"desktop", "original-1gpu", "rtx3060-64gb", "two-desktops"}
    assert wanted <= machine_files().keys()


def test_reads_a_machine(tmp_path):
    machine = read(tmp_path, SMALL)
    assert machine.n_devices == 2
    assert machine.drive_rates == (2e9,)
    assert machine.device.link_rate == 0
    assert machine.sources["drive0.rate"] == "made up"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[host]", "[host]\nrma_bytes = 1.0", "rma_bytes"),
        ("title =", "colour = 1\ntitle =", "colour"),
        ("rate = 2e9\n", "rate = 2e9\nlatency_s = 1e-4\n", "drive0.latency_s has no source"),
        ('layer_s = "made up"', 'layer_s = " "', "software.layer_s has no source"),
        ('layer_s = "made up"', 'layer_s = "made up"\nother = "x"', "other"),
        ("rate = 2e9", "rate = -2e9", "rate = -2000000000.0"),
        ("rate = 2e9", 'rate = "fast"', "drive0.rate"),
        ("count = 2", "count = 1.5", "device0.count"),
        ("count = 2", "count = true", "device0.count"),
        ("count = 2", "count = 0", "count = 0"),
        ("layer_s = 1e-5", "", "layer_s"),
        ("title =", "nodes = 2\ntitle =", "network"),
        ("[[drive]]", "[[device]]\nmatrix_rate = 1.0\n[[drive]]", "missing"),
        ("[host]", "[host", "not a TOML file"),
    ],
)
def test_refuses_what_is_wrong_and_says_what(tmp_path, old, new, said):
    assert old in SMALL
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        read(tmp_path, SMALL.replace(old, new, 1))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="desktop, h200, original-1gpu"):
        find_machine("mainframe")
