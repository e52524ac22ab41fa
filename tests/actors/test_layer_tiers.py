"""Hosted layers whose experts do not fit: same text and decisions, whatever lies where and when."""

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from support import cpu_layers
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of, told
from support.tiny_gguf import write_tiny

from fomoe.actors import layer_calls
from fomoe.actors.layer_traffic import FROM_SCORES, FROM_STREAM
from fomoe.config import RoutingConfig
from fomoe.errors import StorageError

CAPACITY = 6
MODES = {"exact": {}, "car": {"quality": "car=0.6"}, "price": {"quality": "price=0.05"}}


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    return cpu_layers.play_devices(monkeypatch)


@pytest.fixture(scope="module")
def want(local_models, prompt):
    model = local_models["mixed"]
    return {
        mode: told(
            model.run(greedy(prompt, 16, logprobs=1, **ask), model.sequence(capacity=CAPACITY))
        )
        for mode, ask in MODES.items()
    }


def budgets(path, n_devices, vram, ram):
    total, _ = slot_bytes(path)
    return {
        "vram": cpu_layers.DENSE_BYTES + int(vram * total) // n_devices, "ram": int(ram * total),
    }  # fmt: skip


def shuffled(seed):
    """Delays of up to some milliseconds, in an order of their own."""
    draw, lock = random.Random(seed), threading.Lock()

    def delay(fetch):
        with lock:
            return draw.choice([0.0, 0.0, 0.0005, 0.004])

    return delay


WAYS = [
    {"delay": None},
    {"delay": 1, "ram_policy": "inclusive"},
    {"delay": 2, "prefetch": False},
    {"delay": 3, "prefetch": False, "overlap": False, "ram_policy": "inclusive"},
    {"delay": 4, "attention": "driver"},
    {"delay": 5, "attention": "driver", "overlap": False, "ram_policy": "inclusive"},
]


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_text_and_decisions_are_those_of_the_cpu_path(
    model_paths, want, prompt, opened, n_devices, way
):
    path, delay = model_paths["mixed"], way["delay"]
    with local_engine(
        path, devices=("hip:0",) * n_devices, prefill_chunk=16, prefetch_budget=1.0,
        **way | {"delay": None if delay is None else shuffled(delay)},
        routing=RoutingConfig(car_capacity=CAPACITY), **budgets(path, n_devices, 0.3, 0.45),
    ) as engine:  # fmt: skip
        assert not engine.plan.on_devices
        for mode, ask in MODES.items():
            events = list(engine.client.stream(greedy(prompt, 16, logprobs=1, **ask)))
            assert finished(events).error is None
            assert told(events) == want[mode], mode
        receipt = finished(events).receipt
        assert receipt.reads_nvme > 0
        assert receipt.hits_ram > 0
        at_rest(engine)
    assert tokens_of(events)
    assert any("hits" in device.calls for device in opened), "nothing ran before all was there"
    assert all(device.closed and not device.runtime.registered for device in opened)


def test_what_ram_has_is_never_read_again(tmp_path):
    """Guesses whose copy was given up for another's leave VRAM, and RAM keeps them."""
    path = write_tiny(
        tmp_path / "m.gguf", layers=8, experts=64, top_k=8, quant="Q4_K", vocab=288,
        attention_interval=4,
    )  # fmt: skip
    text = np.random.default_rng(0).integers(3, 280, 60).tolist()
    with local_engine(
        path, devices=("hip:0",) * 2, prefetch_budget=1.0, prefill_chunk=16, ctx_size=128,
        ram_policy="inclusive", **budgets(path, 2, 0.15, 1.5),
    ) as engine:  # fmt: skip
        receipts = [
            finished(list(engine.client.stream(replace(greedy([3], 60), forced=text)))).receipt
            for _ in range(4)
        ]
    assert receipts[0].nvme_bytes > 0
    assert [receipt.nvme_bytes for receipt in receipts[2:]] == [0, 0]
    assert receipts[-1].hits_ram > receipts[-1].hits_device


@pytest.mark.parametrize(("n_devices", "attention"), [(2, "device"), (1, "driver"), (2, "driver")])
def test_the_stream_that_goes_into_a_layer_is_heard_on_the_way(
    model_paths, prompt, n_devices, attention
):
    path = model_paths["mixed"]
    with local_engine(
        path, devices=("hip:0",) * n_devices, prefetch_budget=1.0, prefill_chunk=16,
        attention=attention, **budgets(path, n_devices, 0.3, 1.2),
    ) as engine:  # fmt: skip
        traffic = engine.handles["driver"].actor._hands.host.traffic
        look_ahead, origins = traffic.look_ahead, []

        def noted(layer, scores, origin):
            origins.append((layer, origin))
            look_ahead(layer, scores, origin)

        traffic.look_ahead = noted
        finished(list(engine.client.stream(greedy(prompt, 16))))
    assert {origin for _, origin in origins} == {FROM_SCORES, FROM_STREAM}
    assert all(layer > 0 for layer, origin in origins if origin == FROM_SCORES)
    if attention == "driver":  # nobody waits elsewhere while it comes
        assert origins.count((0, FROM_STREAM)) == origins.count((3, FROM_STREAM)) == 15


@pytest.mark.parametrize(
    ("n_devices", "chunk", "attention"),
    [(1, 1, "device"), (2, 16, "device"), (2, 1, "driver"), (1, 16, "driver")],
)
def test_reads_that_fail_end_a_request_and_not_the_engine(
    model_paths, want, prompt, n_devices, chunk, attention
):
    path = model_paths["mixed"]
    with local_engine(
        path, devices=("hip:0",) * n_devices, prefill_chunk=chunk, prefetch_budget=1.0,
        attention=attention,
        routing=RoutingConfig(car_capacity=CAPACITY), **budgets(path, n_devices, 0.3, 0.45),
    ) as engine:  # fmt: skip
        storage = engine.handles["storage-0"].actor
        read, draw, failures = storage._reader.read_piece, random.Random(5), []

        def failing(piece, expert, slot):
            if draw.random() < 0.1:
                failures.append(expert)
                raise StorageError("the drive has had enough")
            return read(piece, expert, slot)

        storage._reader.read_piece = failing
        ends = []
        for _ in range(8):
            events = list(engine.client.stream(greedy(prompt, 16, logprobs=1)))
            ends.append(finished(events).error)
            if ends[-1] is None:
                assert told(events) == want["exact"]
        assert any(end and "had enough" in end for end in ends)
        storage._reader.read_piece = read
        events = list(engine.client.stream(greedy(prompt, 16, logprobs=1)))
        assert told(events) == want["exact"]
        at_rest(engine)


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "at once"])
def test_a_read_that_fails_behind_a_cancelled_pass_is_nobody_else_s(
    model_paths, want, prompt, monkeypatch, wait_for, idle
):
    """A chunk of one token ends with its reader while the device waits for bytes."""
    monkeypatch.setattr(layer_calls, "_STEP_BOUND_S", 10.0)
    path = model_paths["mixed"]
    with local_engine(
        path, devices=("hip:0",), prefill_chunk=1, prefetch=False,
        routing=RoutingConfig(car_capacity=CAPACITY), **budgets(path, 1, 0.3, 0.3),
    ) as engine:  # fmt: skip
        reader = engine.handles["storage-0"].actor._reader
        host = engine.handles["driver"].actor._hands.host
        read, begin, reading, go_on = (
            reader.read_piece,
            host.begin,
            threading.Event(),
            threading.Event(),
        )

        def failing(piece, expert, slot):
            reading.set()
            assert go_on.wait(10)
            raise StorageError("the drive has had enough")

        def cancelled(layer, route, **options):
            begin(layer, route, **options)
            if reading.wait(0.05):
                engine.client.cancel("gone")
                time.sleep(0.1)  # until the driver has it

        reader.read_piece, host.begin = failing, cancelled
        events = list(engine.client.stream(greedy(prompt, 4, request_id="gone")))
        assert finished(events).reason == "cancelled"
        assert host.links[0].open is not None
        reader.read_piece, host.begin = read, begin
        go_on.set()
        if idle:
            wait_for(lambda: host.links[0].open is None)
        events = list(engine.client.stream(greedy(prompt, 16, logprobs=1)))
        assert told(events) == want["exact"]
        at_rest(engine)


@pytest.mark.parametrize("n_devices", [1, 2])
def test_each_step_is_timed_by_its_own_answer(model_paths, prompt, n_devices):
    path = model_paths["mixed"]
    with local_engine(
        path, devices=("hip:0",) * n_devices, prefetch_budget=1.0, prefill_chunk=16,
        **budgets(path, n_devices, 0.3, 0.45),
    ) as engine:  # fmt: skip
        traffic, timed = engine.handles["driver"].actor._hands.host.traffic, []
        traffic._governor.step = lambda *figures: timed.append(figures)
        receipt = finished(list(engine.client.stream(greedy(prompt, 16)))).receipt
        assert not traffic._asked
    assert len(timed) == 15 * 3  # of four layers; the first one's answer ends a token, too
    assert sum(reads for *_, reads, _ in timed) <= receipt.reads_nvme


def test_a_prompt_of_one_token_is_not_timed_as_a_decode_step(model_paths):
    path = model_paths["mixed"]
    with local_engine(
        path, devices=("hip:0",), prefetch_budget=1.0, **budgets(path, 1, 0.3, 0.45)
    ) as engine:
        finished(list(engine.client.stream(greedy([3], 8))))
        governor = engine.handles["driver"].actor._hands.host.traffic._governor
    assert 0 < governor._means.layer < 10


def at_rest(engine):
    """Tables agree, and no copy is unanswered but those of ahead lists."""
    host = engine.handles["driver"].actor._hands.host
    host.placed.residency.check_integrity()
    for segment in host.placed.segments:
        assert int(segment.users.sum()) == int(segment.ahead.sum())


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
def test_experts_come_in_parts_where_they_pass_through_few_slots(
    model_paths, want, prompt, n_devices, overlap
):
    path = model_paths["mixed"]
    with local_engine(
        path, devices=("hip:0",) * n_devices, overlap=overlap, prefill_chunk=16, delay=shuffled(4),
        routing=RoutingConfig(car_capacity=CAPACITY), **budgets(path, n_devices, 0.3, 0.07),
    ) as engine:  # fmt: skip
        host = engine.handles["driver"].actor._hands.host
        more, parts = host.placed.more, []
        host.placed.more = lambda **options: parts.append(0) or more(**options)
        for mode, ask in MODES.items():
            events = list(engine.client.stream(greedy(prompt, 16, logprobs=1, **ask)))
            assert told(events) == want[mode], mode
        assert parts
        at_rest(engine)
