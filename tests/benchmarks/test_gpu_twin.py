"""The twin beside the ping-pong says what its inputs imply, over a made-up run."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

from memory_file import MemoryFile, spec_of
from synthetic.model_file import Recipe, write_model
from synthetic.shapes import SHAPES

from fomoe.errors import ConfigError
from fomoe.sim.machine import find_machine
from fomoe.sim.shapes import shape_of, shape_of_file

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "twin.py"
BANDWIDTH = {"device_copy": 4e12, "bus": {"to_device": 50e9, "both_ways": 100e9}}
PLAIN = {"wall ms": 3.0, "compute ms": 1.0, "MB per token": 130.0}
RUN = {
    "model": "tiny60-8l.gguf",
    "tokens": 100,
    "two": {
        "alone": {"ms": 1.0}, "hits in VRAM": 0.6, "plain": PLAIN,
        "delayed": PLAIN | {"compute ms": 3.0, "wall ms": 4.0},
    },
    "one": {"alone": {"ms": 0.9}, "hits in VRAM": 0.6, "plain": PLAIN},
}  # fmt: skip


def load():
    """Import it by its path: the folder above has a `twin`, too."""
    spec = importlib.util.spec_from_file_location("gpu_twin", SCRIPT)
    module = sys.modules["gpu_twin"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


twin = load()


@pytest.fixture(scope="module")
def shape():
    return twin.model_shape(None, "tiny60-8l.gguf")


@pytest.fixture(scope="module")
def machine():
    return twin.card(find_machine("h200"), BANDWIDTH)


def test_a_synthetic_model_is_known_by_its_name(tmp_path):
    recipe = Recipe(shape=replace(SHAPES["tiny60"], vocab=600), layers=4)
    write_model(tmp_path / "small.gguf", recipe)
    ours = shape_of(MemoryFile(recipe), spec_of(recipe.shape, 4))
    theirs = shape_of_file(tmp_path / "small.gguf")
    for name in ("layer_bytes", "shared_bytes", "expert_bytes", "head_bytes", "state_bytes"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    with pytest.raises(ConfigError, match="other-4l"):
        twin.model_shape(None, "other-4l.gguf")


def test_the_machine_has_the_card_s_bandwidths(machine):
    device = machine.device
    assert (device.dense_rate, device.expert_rate, device.link_rate) == (4e12, 4e12, 50e9)
    assert (machine.n_devices, machine.host.memory_rate) == (1, 100e9)


def test_turns_and_delays_take_their_time(machine, shape):
    case = twin.Case(measured_ms=1.0, context=50)
    bare = twin.predict(machine, shape, case).ms
    turns = twin.predict(machine, shape, case, handoffs=True, turn_s=140e-6).ms
    delayed = twin.predict(machine, shape, replace(case, delay_s=1e-3)).ms
    for each in ("low", "mid", "high"):
        # not scaled by any corner, and once a layer
        assert getattr(turns, each) - getattr(bare, each) == pytest.approx(8 * 0.140, rel=1e-6)
        assert getattr(delayed, each) - getattr(bare, each) == pytest.approx(8 * 1.0, rel=1e-6)
    handed = twin.predict(machine, shape, case, handoffs=True).ms
    way_ms = 8e3 * machine.software.handoff_s
    assert handed.mid - bare.mid == pytest.approx(way_ms, rel=1e-6)
    assert handed.high - bare.high == pytest.approx(2 * way_ms, rel=1e-6)


def test_misses_cross_the_link(machine, shape):
    case = twin.Case(measured_ms=1.0, context=50, hits=0.0)
    slow = replace(machine, devices=(replace(machine.device, link_rate=1e8),))
    found = twin.predict(slow, shape, case)
    nbytes = shape.token_expert_bytes
    assert found.crossed_mb == pytest.approx(nbytes / 1e6)
    assert found.binds == "link"
    assert 1e3 * nbytes / 1e8 < found.ms.mid < found.blind_ms


def test_every_run_is_compared(machine, shape):
    result = twin.compare(machine, shape, RUN, 140e-6)
    assert {a: set(runs) for a, runs in result.items()} == {
        "two": {"alone", "plain", "delayed"}, "one": {"alone", "plain"},
    }  # fmt: skip
    assert set(result["two"]["plain"]) - set(result["one"]["plain"]) == {"turns"}
    delayed = result["two"]["delayed"]
    assert delayed["delay us per layer"] == 250.0  # 2 ms over 8 layers
    assert delayed["measured ms"] == 4.0
    low, mid, high = delayed["turns"]["predicted ms"]
    assert low <= mid <= high
    assert delayed["turns"]["predicted / measured"] == pytest.approx(mid / 4.0, abs=1e-4)
    assert delayed["turns"]["within 15%"] == (abs(mid / 4.0 - 1) <= 0.15)


def test_hits_may_stand_once_for_all_runs(machine, shape):
    summary = RUN | {"hits in VRAM": 0.25, "two": {"plain": PLAIN}, "one": {"alone": {"ms": 0.9}}}
    result = twin.compare(machine, shape, summary, 140e-6)
    assert result["two"]["plain"]["hits in VRAM"] == 0.25
    assert result["one"]["alone"]["hits in VRAM"] == 1.0


def test_it_prints_json_last(tmp_path, monkeypatch, capsys):
    (tmp_path / "b.json").write_text(json.dumps(BANDWIDTH, indent=1))
    (tmp_path / "p.log").write_text("up in 1 s\n" + json.dumps(RUN) + "\n")
    monkeypatch.setattr(sys, "argv", [
        "twin.py", "--bandwidth", str(tmp_path / "b.json"), "--pingpong", str(tmp_path / "p.log"),
        "--out", str(tmp_path / "r.json"),
    ])  # fmt: skip
    twin.main()
    printed = capsys.readouterr().out.strip().splitlines()
    assert json.loads(printed[-1]) == json.loads((tmp_path / "r.json").read_text())
    assert sum("predicted / measured" in line for line in printed[:-1]) == 8
