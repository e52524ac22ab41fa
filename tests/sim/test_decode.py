import dataclasses
import itertools

import numpy as np
import pytest
from support.small_machine import EXPERT, LAYERS, make_loads, make_machine, scaled, small_shape

from fomoe.errors import ConfigError
from fomoe.sim.decode import decode
from fomoe.sim.loads import Loads
from fomoe.sim.schedule import Schedule


@pytest.fixture
def shape():
    return small_shape()


SCHEDULES = {
    "serial": Schedule(overlap=False),
    "together": Schedule(together=True),
    "as they land": Schedule(),
    "guesses": Schedule(recall=0.6, waste=0.5),
    "far guesses": Schedule(recall=0.6, depth=3),
    "processor": Schedule(cpu_arm=True),
    "expert-parallel": Schedule(split="experts", recall=0.5),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def loads_for(schedule, machine, **more):
    return make_loads(owners=machine.n_devices if schedule.split == "experts" else 1, **more)


@schedules
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("drives", [1, 3])
def test_no_resource_works_longer_than_the_token_takes(shape, schedule, nodes, drives):
    machine = make_machine(nodes=nodes, drives=drives)
    outcome = decode(machine, shape, loads_for(schedule, machine), schedule)
    for name, busy in outcome.busy.items():
        assert (busy <= outcome.wall + 1e-12).all(), name


@schedules
def test_bytes_are_conserved(shape, schedule):
    machine = make_machine()
    loads = loads_for(schedule, machine)
    outcome = decode(machine, shape, loads, schedule)
    sums = {n: getattr(loads, n).sum(axis=(1, 2)) for n in ("device", "ram", "nvme")}
    np.testing.assert_allclose(outcome.read_bytes, sums["nvme"] * EXPERT + outcome.wasted_bytes)
    copied = sums["nvme"] + (0 if schedule.cpu_arm else sums["ram"])
    np.testing.assert_allclose(outcome.link_bytes, copied * EXPERT)
    assert schedule.recall > 0 or not outcome.wasted_bytes.any()
    # What computes is all activations, and the dense part once.
    device = machine.device
    computed = sums["device"] + sums["nvme"] + (0 if schedule.cpu_arm else sums["ram"])
    wanted = computed * EXPERT / device.expert_rate + shape.dense_bytes / device.dense_rate
    np.testing.assert_allclose(outcome.busy["device"] * machine.n_devices, wanted)


def test_the_serial_schedule_takes_the_sum_of_its_jobs(shape):
    machine, loads = make_machine(), make_loads()
    outcome = decode(machine, shape, loads, Schedule(overlap=False, pieces=2))
    ram, nvme = (getattr(loads, n).sum(axis=(1, 2)) for n in ("ram", "nvme"))
    drive, soft = machine.drives[0], machine.software
    reads = nvme * (EXPERT / drive.rate + 2 * drive.request_s + drive.latency_s)
    reads += (loads.nvme.sum(axis=2) > 0).sum(axis=1) * soft.reads_s
    copies = (ram + nvme) * EXPERT / machine.device.link_rate
    arithmetic = (
        shape.dense_bytes / machine.device.dense_rate
        + shape.top_k * LAYERS * EXPERT / machine.device.expert_rate
    )
    steps = LAYERS * soft.layer_s + (LAYERS - 1) * soft.handoff_s + soft.token_s
    np.testing.assert_allclose(outcome.wall, reads + copies + arithmetic + steps)


def test_perfect_foresight_takes_the_longest_resource(shape):
    """With all misses known long before, the drive never waits: the token takes its time."""
    machine = make_machine(layer_s=1e-9, link=1e12)
    loads = make_loads((0.2, 0.0, 0.8), tokens=20)
    ahead = Schedule(recall=1, waste=0, depth=LAYERS, decay=1)
    outcome = decode(machine, shape, loads, ahead)
    first = machine.drives[0].latency_s + machine.software.token_s + machine.software.reads_s
    edges = (shape.layer_bytes[0] + shape.head_bytes) / machine.device.dense_rate + first
    last = shape.top_k * EXPERT / machine.device.expert_rate + 1e-4
    assert (outcome.wall >= outcome.busy["drive"]).all()
    assert (outcome.wall <= outcome.busy["drive"] + edges + last).all()


def test_idle_time_before_another_router_is_used_for_guesses_further_ahead():
    """Every other layer is waited for long, but has misses of its own that nobody guessed."""
    shape = small_shape()
    shape = dataclasses.replace(shape, layer_bytes=np.tile([2e8, 1e3], LAYERS // 2))
    loads = make_loads((0.4, 0.0, 0.6))
    near, far = (
        decode(make_machine(), shape, loads, Schedule(recall=0.5, waste=0, depth=depth, decay=1.0))
        for depth in (1, 2)
    )
    # Guessed are half of 2.4 misses of 1 ms each, in the two later ones of three short layers.
    saved = near.wall - far.wall
    assert 0.5e-3 < saved.mean() < 2.4e-3
    np.testing.assert_allclose(near.read_bytes, far.read_bytes)


def test_nothing_is_copied_before_it_was_read(shape):
    """Where the link is the slow one, an expert of the drive comes after one of RAM."""
    machine = make_machine(link=2e8)
    ram, nvme = (
        decode(machine, shape, make_loads(shares, tokens=3), Schedule()).wall
        for shares in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    )
    first = EXPERT / machine.drives[0].rate / 3
    assert (nvme - ram >= LAYERS * first).all()


def test_a_token_takes_no_less_than_its_traffic_through_memory(shape):
    machine, loads = make_machine(), make_loads()
    slow = dataclasses.replace(machine, host=dataclasses.replace(machine.host, memory_rate=5e8))
    outcome = decode(slow, shape, loads, Schedule())
    np.testing.assert_allclose(
        outcome.wall, (outcome.read_bytes + outcome.link_bytes) / 5e8, rtol=1e-12
    )
    assert outcome.binds == "memory"


def test_another_node_reads_when_it_has_been_told(shape):
    """With nothing but reads, each layer waits for the way there and back."""
    shape = dataclasses.replace(shape, n_layers=1, layer_bytes=np.full(1, 1.0),
                                shared_bytes=np.full(1, 1.0))  # fmt: skip
    machine = make_machine(nodes=2, devices=1)
    where = np.array([0, 1], np.int16).reshape(1, 1, 2)
    nothing = np.zeros_like(where)
    far, near = (
        decode(machine, shape, Loads(device=nothing, ram=nothing, nvme=w, demoted=nothing),
               Schedule(split="experts"))
        for w in (where, where[..., ::-1].copy())
    )  # fmt: skip
    network = machine.network
    message = network.latency_s + shape.hidden * 4 / network.rate
    np.testing.assert_allclose(far.wall - near.wall, 2 * message, rtol=1e-6)


def test_no_overlap_is_slower_than_any_other_order(shape):
    machine, loads = make_machine(), make_loads()
    serial = decode(machine, shape, loads, SCHEDULES["serial"]).wall
    together = decode(machine, shape, loads, SCHEDULES["together"]).wall
    landing = decode(machine, shape, loads, SCHEDULES["as they land"]).wall
    assert (together <= serial + 1e-12).all()
    assert (landing <= together + 1e-12).all()
    assert landing.sum() < 0.9 * serial.sum()


@pytest.mark.parametrize("what", ["drive", "link", "expert"])
@pytest.mark.parametrize("name", ["serial", "together", "as they land", "expert-parallel"])
def test_a_faster_part_never_makes_a_token_slower(shape, what, name):
    schedule, machine = SCHEDULES[name], make_machine()
    schedule = dataclasses.replace(schedule, recall=0.0)
    loads = loads_for(schedule, machine)
    walls = [
        decode(scaled(machine, **{what: factor}), shape, loads, schedule).wall
        for factor in (0.5, 1.0, 2.0, 4.0)
    ]
    for slow, fast in itertools.pairwise(walls):
        assert (fast <= slow + 1e-12).all()
    assert walls[-1].sum() < walls[0].sum()


def test_a_second_drive_and_foresight_help_where_the_drive_binds(shape):
    loads = make_loads((0.5, 0.0, 0.5))
    plain = decode(make_machine(), shape, loads, Schedule())
    assert plain.binds == "drive"
    two = decode(make_machine(drives=2), shape, loads, Schedule())
    assert two.tokens_per_s > 1.3 * plain.tokens_per_s
    speeds = [
        decode(make_machine(), shape, loads, Schedule(recall=r, waste=0)).tokens_per_s
        for r in (0.0, 0.1, 0.5, 0.85, 1.0)
    ]
    assert speeds == sorted(speeds)
    assert speeds[-1] > 1.02 * speeds[0]


def test_without_a_link_nothing_is_copied_and_cores_are_shared(shape):
    machine = make_machine(link=0.0)
    device = dataclasses.replace(machine.devices[0], shares_cores=True, memory_bytes=0.0)
    machine = dataclasses.replace(machine, devices=(device,))
    outcome = decode(machine, shape, make_loads(), Schedule())
    assert not outcome.link_bytes.any()
    arithmetic = shape.dense_bytes / device.dense_rate + 4 * LAYERS * EXPERT / device.expert_rate
    np.testing.assert_allclose(outcome.busy["device"], arithmetic)


def test_the_same_call_gives_the_same_bits(shape):
    machine, loads = make_machine(), make_loads()
    one = decode(machine, shape, loads, SCHEDULES["far guesses"], seed=5)
    two = decode(machine, shape, loads, SCHEDULES["far guesses"], seed=5)
    assert one.wall.tobytes() == two.wall.tobytes()
    other = decode(machine, shape, loads, SCHEDULES["far guesses"], seed=6)
    assert one.wall.tobytes() != other.wall.tobytes()


def test_a_longer_context_costs_what_its_keys_and_values_take(shape):
    machine, loads = make_machine(), make_loads((1.0, 0.0, 0.0))
    short = decode(machine, shape, loads, Schedule(overlap=False))
    long = decode(machine, shape, loads, Schedule(overlap=False), context=5000)
    np.testing.assert_allclose(long.wall - short.wall, 5000 * 1e3 / machine.device.dense_rate)


def test_refuses_loads_of_another_model_and_schedules_without_sense(shape):
    machine, loads = make_machine(), make_loads()
    with pytest.raises(ConfigError, match="loads of 6 layers for 7"):
        decode(machine, dataclasses.replace(shape, n_layers=7), loads, Schedule())
    with pytest.raises(ConfigError, match="1 owners for 2 devices"):
        decode(machine, shape, loads, Schedule(split="experts"))
    idle = dataclasses.replace(machine, host=dataclasses.replace(machine.host, cpu_rate=0.0))
    with pytest.raises(ConfigError, match="cpu_rate"):
        decode(idle, shape, loads, SCHEDULES["processor"])
    for wrong in ({"recall": 1.1}, {"waste": -0.1}, {"depth": 0}, {"pieces": 0}, {"decay": 0.0}):
        with pytest.raises(ConfigError):
            Schedule(**wrong)
