"""Experts that the processor computes in RAM beside devices: same sums, fixed bits, clear ends."""

import os
import random
import signal
import threading

import pytest
from support import cpu_layers
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of, told

from fomoe.config import RoutingConfig
from fomoe.errors import ConfigError, StorageError

pytestmark = pytest.mark.timeout(60)

TABLE = "0 1 1 2"
CAPACITY = 6
COUNT = 16
MODES = {"exact": {}, "car": {"quality": "car=0.6"}}


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    return cpu_layers.play_devices(monkeypatch)


def start(path, n_devices=1, *, vram=0.3, ram=0.45, **options):
    total, _ = slot_bytes(path)
    budgets = {
        "vram": cpu_layers.DENSE_BYTES + int(vram * total) // n_devices, "ram": int(ram * total),
    }  # fmt: skip
    given = {"cpu_arm": TABLE, "prefill_chunk": 16} | budgets | options
    routing = RoutingConfig(car_capacity=CAPACITY)
    return local_engine(path, devices=("hip:0",) * n_devices, routing=routing, **given)


def shuffled(seed):
    draw, lock = random.Random(seed), threading.Lock()

    def delay(fetch):
        with lock:
            return draw.choice([0.0, 0.0, 0.0005, 0.004])

    return delay


def ask(engine, prompt, **options):
    return list(engine.client.stream(greedy(prompt, COUNT, logprobs=1, **options)))


def at_rest(engine):
    host = engine.handles["driver"].actor._hands.host
    host.placed.residency.check_integrity()
    for segment in host.placed.segments:
        assert not segment.users.any()
        assert not segment.ahead.any()


def logprobs(events):
    return [event.logprob for event in events if hasattr(event, "logprob")]


@pytest.mark.parametrize("table", [TABLE, "0 1 2 3"])
def test_the_text_is_that_of_the_cpu_path_up_to_rounding(model_paths, local_models, prompt, table):
    want = local_models["mixed"].run(greedy(prompt, COUNT, logprobs=1))
    with start(model_paths["mixed"], cpu_arm=table) as engine:
        got = ask(engine, prompt)
        storage = engine.handles["storage-0"].actor
        receipt = finished(got).receipt
        assert receipt.cpu_arm == table
        assert storage.stats()["arm_experts"] == receipt.computed_in_ram > COUNT
        at_rest(engine)
    assert tokens_of(got) == tokens_of(want)
    assert logprobs(got) == pytest.approx(logprobs(want), abs=2e-3)
    assert logprobs(got) != logprobs(want), "nothing was added up in another order"


@pytest.mark.parametrize(("n_devices", "policy"), [(1, "exclusive"), (2, "inclusive")])
def test_when_anything_comes_changes_no_bit(model_paths, prompt, n_devices, policy):
    texts = []
    for overlap, delays in ((True, 1), (False, None)):
        with start(
            model_paths["mixed"], n_devices, ram_policy=policy, overlap=overlap,
            prefetch_budget=1.0, delay=None if delays is None else shuffled(delays),
        ) as engine:  # fmt: skip
            runs = [ask(engine, prompt[at:], **MODES[mode]) for at, mode in
                    ((0, "exact"), (0, "car"), (7, "exact"))]  # fmt: skip
            at_rest(engine)
        receipts = [finished(run).receipt for run in runs]
        assert all(receipt.computed_in_ram for receipt in receipts)
        costs = [(r.computed_in_ram, r.ram_bytes, r.nvme_bytes) for r in receipts]
        texts.append(([told(run) for run in runs], costs))
    assert texts[1] == texts[0]


def test_reads_that_fail_end_a_request_and_not_the_engine(model_paths, prompt):
    with start(model_paths["mixed"], 2, prefill_chunk=1) as engine:
        storage = engine.handles["storage-0"].actor
        read, draw = storage._reader.read_piece, random.Random(5)

        def failing(piece, expert, slot):
            if draw.random() < 0.1:
                raise StorageError("the drive has had enough")
            return read(piece, expert, slot)

        storage._reader.read_piece = failing
        ends = [finished(ask(engine, prompt)).error for _ in range(6)]
        assert any(end and "had enough" in end for end in ends)
        storage._reader.read_piece = read
        assert finished(ask(engine, prompt)).error is None
        at_rest(engine)


def test_steps_in_parts_compute_nothing_in_ram(model_paths, prompt, local_models):
    want = local_models["mixed"].run(greedy(prompt, COUNT, logprobs=1))
    with start(model_paths["mixed"], ram=0.07) as engine:
        host = engine.handles["driver"].actor._hands.host
        more, parts = host.placed.more, []
        host.placed.more = lambda **options: parts.append(host.placed.n_stay) or more(**options)
        assert tokens_of(ask(engine, prompt)) == tokens_of(want)
        assert parts
        assert not any(parts)
        at_rest(engine)


@pytest.mark.parametrize(("options", "expected"), [
    ({"cpu_arm": "0 0 0 0"}, "off"), ({"cpu_arm": "off"}, "off"), ({"vram": 1.2}, "off"),
])  # fmt: skip
def test_an_arm_that_is_off_costs_nothing(model_paths, prompt, opened, options, expected):
    with start(model_paths["mixed"], **options) as engine:
        receipt = finished(ask(engine, prompt)).receipt
        arena = engine.handles["driver"].actor._hands.host.links[0].views
        assert not arena.input.any()
        assert not arena.sum_word.any()
        looks = engine.handles["driver"].actor._hands._traffic.looks_ahead
        assert looks == (not engine.plan.on_devices)
    assert receipt.cpu_arm == expected
    assert not receipt.computed_in_ram


def test_a_table_of_another_model_is_refused(model_paths):
    with (
        pytest.raises(ConfigError, match="is for 2 experts a token, this model has 3: give 4"),
        start(model_paths["mixed"], cpu_arm="0 0 1"),
    ):
        pytest.fail("it came up")


def test_kernels_that_fail_end_the_engine(model_paths, prompt, wait_for):
    with start(model_paths["mixed"]) as engine:
        storage = engine.handles["storage-0"].actor

        def run_away(*args):
            raise StorageError("the processor has run away")

        events = []
        for event in engine.client.stream(greedy(prompt, 400)):
            events.append(event)
            if len(tokens_of(events)) == 3:
                storage._arm.kernels.run = run_away
        assert "storage-0 has died" in finished(events).error
        wait_for(lambda: engine.client.status().state == "degraded")


def test_a_killed_storage(model_paths, prompt, monkeypatch, wait_for):
    cpu_layers.play_processes(monkeypatch)
    with start(model_paths["mixed"], 2) as engine:
        events = []
        for event in engine.client.stream(greedy(prompt, 4000)):
            events.append(event)
            if len(tokens_of(events)) == 2:
                os.kill(engine.handles["storage-0"].process.pid, signal.SIGKILL)
        assert "storage-0 has died" in finished(events).error
        wait_for(lambda: engine.client.status().state == "degraded", 2)
