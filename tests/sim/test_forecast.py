import dataclasses

import pytest
from support.small_machine import make_machine, small_shape

from fomoe.errors import BudgetError
from fomoe.sim.forecast import Question, Span, Twin, corners, fit_model, in_corner, upgrades
from fomoe.sim.loads import synthetic_scores
from fomoe.sim.machine import find_machine
from fomoe.sim.prompt import Spread, prompt_time
from fomoe.sim.shapes import shape_by_name


@pytest.fixture(scope="module")
def large():
    return shape_by_name("397b-a17b")


@pytest.fixture(scope="module")
def twin(large):
    return Twin(large, Question())


def test_the_shape_of_the_397b_has_the_published_sizes(large):
    assert large.routed_bytes == pytest.approx(217.5 * 2**30, rel=0.001)
    assert large.token_expert_bytes == pytest.approx(4.56e9, rel=0.001)
    assert large.dense_bytes == pytest.approx(8.8e9, rel=0.03)
    assert large.kv_bytes == 30_720
    assert large.state_bytes == pytest.approx(189e6, rel=0.05)


def test_the_desktop_holds_what_the_original_held_on_its_devices(large):
    fit = fit_model(find_machine("desktop"), large, 4096)
    assert fit.device_slots == pytest.approx(49.5, abs=1)
    assert fit.ram_slots == pytest.approx(26.9e9 / large.expert_bytes.sum(), rel=0.001)
    assert fit.device_bytes <= fit.device_total
    assert fit.ram_bytes <= fit.ram_total


def test_budgets_bound_the_slots(large):
    machine = find_machine("desktop")
    fit = fit_model(machine, large, 4096, device_budget=5e9, ram_budget=16e9)
    assert fit.device_slots == pytest.approx(1e10 / large.expert_bytes.sum())
    assert fit.ram_slots == pytest.approx(16e9 / large.expert_bytes.sum())


def test_says_what_is_needed_where_a_model_does_not_fit(large):
    with pytest.raises(BudgetError) as caught:
        fit_model(find_machine("rtx3060-64gb"), large, 200_000)
    assert caught.value.needed_bytes > caught.value.given_bytes


def test_memory_of_the_host_is_shared_by_devices_without_their_own():
    machine, shape = make_machine(link=0.0), small_shape()
    device = dataclasses.replace(machine.devices[0], memory_bytes=0.0, shares_cores=True)
    machine = dataclasses.replace(machine, devices=(device,))
    fit = fit_model(machine, shape, 1000)
    assert (fit.device_slots, fit.ram_slots) == (shape.n_experts, 0)
    split = fit_model(machine, shape, 1000, device_budget=2.4e7, ram_budget=3e7)
    assert (split.device_slots, split.ram_slots) == (8, 5)


def test_what_is_all_resident_reads_nothing():
    twin = Twin(small_shape(), Question(context=100))
    machine = make_machine()
    outcome = twin.outcome(machine, corners(machine)[1])
    assert not outcome.read_bytes.any()


def test_predictions_have_ranges_and_the_drive_binds_on_the_desktop(twin):
    machine = find_machine("desktop")
    speed = twin.speed(machine)
    assert speed.low < speed.mid < speed.high
    assert twin.outcome(machine, corners(machine)[1]).binds == "drive"
    for tokens in (64, 512, 4096):
        prompt = twin.prompt(machine, tokens)
        assert prompt.low < prompt.mid < prompt.high
    assert twin.prompt(machine, 4096).mid < 20


def test_upgrades_help_where_they_should(twin):
    machine = find_machine("desktop")
    gains = {name: twin.upgrade(machine, box) for name, box in upgrades(machine).items()}
    assert set(gains) == {
        "a second drive like the first", "32 GB more RAM", "one more GPU of the kind",
    }  # fmt: skip
    for gain in gains.values():
        assert 0 < gain.low <= gain.mid <= gain.high


def test_a_text_wants_as_many_experts_as_the_original_counted():
    spread = Spread.of(synthetic_scores(200, 4, 512, seed=0), 10)
    assert spread.distinct(1) == pytest.approx(10, abs=4)
    assert spread.distinct(150) == pytest.approx(258, rel=0.1)  # fomoe-397b.freq
    assert spread.distinct(8192) == pytest.approx(512, abs=1)


def test_a_prompt_costs_a_sweep_whatever_its_length_up_to_a_chunk(large):
    machine = find_machine("desktop")
    spread = Spread.of(synthetic_scores(200, 4, 512, seed=0), 10)
    times = {t: prompt_time(machine, large, spread, t, (50, 36)) for t in (64, 2048, 4096, 8192)}
    sweep = (large.routed_bytes - 86 * large.expert_bytes.sum()) / 14.5e9
    assert times[4096].drive == pytest.approx(sweep, rel=0.01)
    assert times[2048].seconds == pytest.approx(times[4096].seconds, rel=0.03)
    assert times[64].seconds < 0.5 * times[4096].seconds
    assert times[8192].seconds == pytest.approx(2 * times[4096].seconds, rel=0.01)
    assert times[4096].binds == "drive"


def test_what_ram_holds_of_a_prompt_is_copied(large):
    machine = find_machine("desktop")
    machine = dataclasses.replace(
        machine, devices=(dataclasses.replace(machine.device, matrix_rate=1e15),)
    )
    spread = Spread.of(synthetic_scores(200, 4, 512, seed=0), 10)
    time = prompt_time(machine, large, spread, 4096, (50, 462))
    copied = large.routed_bytes * 462 / 512 / (machine.n_devices * machine.device.link_rate)
    assert time.drive == 0
    assert time.link == pytest.approx(copied, rel=0.01)
    assert time.binds == "link"
    assert time.seconds > time.link


def test_what_reads_take_besides_is_the_engines_own_time():
    machine = make_machine()
    for corner in corners(machine):
        soft = in_corner(machine, corner).software
        assert soft.reads_s == machine.software.reads_s * corner.software


def test_a_span_is_in_order_whatever_the_corners_say():
    assert Span.of((3.0, 2.0, 1.0)) == Span(1.0, 2.0, 3.0)
    assert Span.of((2.0, 1.0, 3.0)) == Span(1.0, 1.0, 3.0)
