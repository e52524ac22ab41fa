"""The same text and the same decisions, whatever the machine does: random machines, random delays.

A run draws devices, the split of slots between tiers, policies, how far decode looks ahead, and a
delay for each read. What may not differ is compared with a run that holds every expert in memory.
"""

import random

import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, told

from fomoe.config import RoutingConfig

CAPACITY, TOKENS = 6, 40
MODES = {
    "exact": {},
    "car": {"quality": "car=0.6"},
    "sampled": {"quality": "car=0.35"},
    "price": {"quality": "price=0.05"},
    "kl": {"quality": "kl=0.05"},
}


def request(prompt, mode):
    ask = greedy(prompt, TOKENS, logprobs=4, **MODES[mode])
    if mode == "sampled":
        hot = {"sampling": type(ask.sampling)(temperature=1.2, seed=11)}
        ask = greedy(prompt, TOKENS, logprobs=4, **MODES[mode], **hot)
    return ask


@pytest.fixture(scope="module")
def want(local_models, prompt):
    model = local_models["mixed"]
    return {
        mode: told(model.run(request(prompt, mode), model.sequence(capacity=CAPACITY)))
        for mode in MODES
    }


def draw(seed, path):
    """A machine as arguments of `local_engine`."""
    rng, (total, _) = random.Random(seed), slot_bytes(path)
    devices = 1 + seed % 3
    least = 2 * 3 * 160 * 1024  # top-3 of both size classes
    return {
        "devices": ("cpu",) * devices,
        "vram": max(least, int(total * rng.uniform(0.1, 0.25)) // devices),
        "ram": int(total * rng.choice([0.0, rng.uniform(0.03, 0.2)])),
        "ram_policy": rng.choice(["exclusive", "inclusive"]),
        "eviction": rng.choice(["lfru", "lru"]),
        "prefill_chunk": rng.choice([1, 7, 16, 64]),
        "read_threads": rng.randint(1, 4),
        "prefetch_depth": 1 + seed % 2,
        "prefetch_budget": 1.0,
        "overlap": rng.random() < 0.9,
    }


def read_every_guess(engine):
    """Let the driver read whatever is named, sure or not, so that much is read in vain."""
    governor = engine.handles["driver"].actor._hands.host.governor
    governor.arrays.allowed[:] = True
    governor.arrays.credit[0] = 1 << 40
    governor.token = lambda: None


def play(path, prompt, seed, delay):
    """Return what each mode told, and the experts that were prefetched."""
    with local_engine(
        path, delay=delay, routing=RoutingConfig(car_capacity=CAPACITY), **draw(seed, path)
    ) as engine:
        heard, prefetched = {}, 0
        if seed % 2:
            read_every_guess(engine)
        for mode in MODES:
            events = list(engine.client.stream(request(prompt, mode)))
            heard[mode] = told(events)
            prefetched += finished(events).receipt.prefetched
        residency = engine.handles["driver"].actor._hands.host.residency
        residency.check_integrity()
    return heard, prefetched


def check(runs, model_paths, want, prompt, delays):
    prefetched = 0
    for seed in runs:
        heard, ahead = play(model_paths["mixed"], prompt, seed, delays(seed))
        assert heard == want, f"run {seed}"
        prefetched += ahead
    assert prefetched > 0  # or looking ahead was not put to the test


def test_delays_and_machines_change_nothing(model_paths, want, prompt, delays):
    assert want["car"][2] > 20
    assert len({told_[1] for told_ in want.values()}) == len(MODES)  # the modes do differ
    check(range(3), model_paths, want, prompt, delays)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(3, 23, 4))
def test_twenty_runs(model_paths, want, prompt, delays, first):
    check(range(first, first + 4), model_paths, want, prompt, delays)


def test_bytes_are_counted_as_they_were_read(model_paths, prompt, delays):
    """Prefetches that storage drops before their read are paid back, and no others."""
    total, _ = slot_bytes(model_paths["mixed"])
    with local_engine(
        model_paths["mixed"], vram=total // 5, ram=0, delay=delays(3, most_s=0.004),
        prefetch_depth=2, prefetch_budget=1.0, read_threads=1,
    ) as engine:  # fmt: skip
        driver, storage = (engine.handles[name].actor for name in ("driver", "storage-0"))
        experts = driver._hands.host
        read_every_guess(engine)
        before = storage.stats()["bytes"]
        dropped = 0
        for start in range(2):
            events = list(engine.client.stream(greedy(prompt[start:], TOKENS)))
            dropped += finished(events).receipt.prefetched_dropped
        assert driver._loop.stop()
        assert storage._loop.stop()
        while storage.poll():  # this thread takes what both had not come to
            pass
        assert storage._queue.drain(10)
        experts.reads.settle()
        assert experts.counters.nvme_bytes == storage.stats()["bytes"] - before
        assert dropped > 0
        experts.residency.check_integrity()
