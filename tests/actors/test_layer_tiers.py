"""Hosted layers whose experts do not fit: same text and decisions, whatever lies where and when."""

import random
import threading

import pytest
from support import cpu_layers
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of

from fomoe.actors import layers
from fomoe.config import RoutingConfig
from fomoe.engine import hosting
from fomoe.engine.requests import TokenEvent

CAPACITY = 6
MODES = {"exact": {}, "car": {"quality": "car=0.6"}, "price": {"quality": "price=0.05"}}


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    found = []

    def open_model(*args):
        found.append(cpu_layers.open_model(*args))
        return found[-1]

    monkeypatch.setattr(layers, "open_model", open_model)
    monkeypatch.setattr(hosting, "planned_bytes", cpu_layers.planned_bytes)
    return found


def told(events):
    tokens = [(e.token, e.logprob) for e in events if isinstance(e, TokenEvent)]
    receipt = finished(events).receipt
    return tokens, receipt.decision_hash, receipt.substituted, receipt.lost_mass


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


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("policy", ["exclusive", "inclusive"])
@pytest.mark.parametrize(
    ("overlap", "prefetch", "delays"),
    [(True, True, None), (True, True, 1), (True, False, 2), (False, False, 3)],
)
def test_text_and_decisions_are_those_of_the_cpu_path(
    model_paths, want, prompt, opened, n_devices, policy, overlap, prefetch, delays
):
    path = model_paths["mixed"]
    with local_engine(
        path, devices=("hip:0",) * n_devices, overlap=overlap, ram_policy=policy,
        prefetch=prefetch, prefill_chunk=16, delay=None if delays is None else shuffled(delays),
        prefetch_budget=1.0,
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
        driver = engine.handles["driver"].actor
        residency, placed = driver._hands.residency, driver._hands.host.placed
        residency.check_integrity()
        for segment in placed.segments:
            assert int(segment.users.sum()) == int(segment.ahead.sum())
    assert tokens_of(events)
    assert all(device.closed and not device.runtime.registered for device in opened)
