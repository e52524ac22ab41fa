"""Cache-aware routing on the whole engine: the text follows the tokens, not the machine."""

from dataclasses import replace
from fractions import Fraction

import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy

from fomoe.config import RoutingConfig
from fomoe.engine.requests import PromptLogprobs, TokenEvent

CAPACITY, TOKENS = 6, 24
ROUTING = RoutingConfig(car_capacity=CAPACITY)

MACHINES = {
    "one device": {"vram": 0.15, "ram": 0.1},
    "slow reads": {"vram": 0.15, "ram": 0.1, "seed": 7},
    "three devices": {"vram": 0.3, "ram": 0.05, "devices": 3, "seed": 8},
    "inclusive": {"vram": 0.1, "ram": 0.2, "ram_policy": "inclusive", "prefill_chunk": 7},
    "everything resident": {"vram": 1.0, "ram": 0.0},
}


def machine(path, delays, *, vram, ram, devices=1, seed=None, routing=ROUTING, **options):
    total, _ = slot_bytes(path)
    return local_engine(
        path, devices=("cpu",) * devices, vram=int(total * vram) // (devices if vram < 1 else 1),
        ram=int(total * ram), delay=None if seed is None else delays(seed),
        routing=routing, **options,
    )  # fmt: skip


def tokens(events):
    return [e for e in events if isinstance(e, TokenEvent)]


@pytest.fixture(scope="module")
def path(model_paths):
    return model_paths["mixed"]


@pytest.fixture(scope="module")
def want(local_models, prompt):
    model = local_models["mixed"]
    request = greedy(prompt, TOKENS, quality="car=0.6", logprobs=8)
    return model.run(request, model.sequence(capacity=CAPACITY))


@pytest.mark.parametrize("name", MACHINES)
def test_the_machine_does_not_matter(name, path, want, prompt, delays, local_models):
    with machine(path, delays, **MACHINES[name]) as engine:
        assert engine.plan.logical_capacity == CAPACITY
        events = list(engine.client.stream(greedy(prompt, TOKENS, quality="car=0.6", logprobs=8)))
        exact = list(engine.client.stream(greedy(prompt, 3, logprobs=8)))
    assert tokens(events) == tokens(want)
    got, expected = finished(events).receipt, finished(want).receipt
    for name_ in ("decision_hash", "substituted", "lost_mass", "mode", "logical_capacity"):
        assert getattr(got, name_) == getattr(expected, name_), name_
    assert (got.mode, got.logical_capacity) == ("car=0.6", CAPACITY)
    assert got.substituted > 20
    # A substituted activation is no hit and no read: the four add up to what was routed.
    activations = engine.plan.topology.n_layers * 3
    decode = got.hits_device + got.hits_ram + got.reads_nvme + got.substituted
    assert decode == activations * (TOKENS - 1)
    prompt_sum = got.prompt_hits_device + got.prompt_hits_ram + got.prompt_reads_nvme
    assert prompt_sum == activations * len(prompt)
    # The next request is exact again, whatever the lossy one left in the caches.
    assert tokens(exact) == tokens(local_models["mixed"].run(greedy(prompt, 3, logprobs=8)))
    assert finished(exact).receipt.substituted == 0


def test_one_engine_many_requests(path, delays, want, prompt, local_models):
    """The prompt is exact, the state is not continued from, a reused prefix changes nothing."""
    model = local_models["mixed"]
    with machine(path, delays, vram=0.15, ram=0.1, seed=4) as engine:

        def run(request):
            return list(engine.client.stream(request))

        exact = run(greedy(prompt, 6, logprobs=8, echo=True))
        lossy = run(greedy(prompt, TOKENS, logprobs=8, echo=True, quality="car=0.6"))
        echoes = [[e for e in r if isinstance(e, PromptLogprobs)] for r in (exact, lossy)]
        assert echoes[0] == echoes[1]
        assert tokens(exact)[0] == tokens(lossy)[0]  # drawn from the prompt's logits
        assert tokens(lossy) == tokens(want)

        longer = prompt + [e.token for e in tokens(lossy)]
        after = run(greedy(longer, 5, logprobs=8))
        assert finished(after).receipt.cached_tokens == 0
        assert tokens(after) == tokens(model.run(greedy(longer, 5, logprobs=8)))

        longer += [e.token for e in tokens(after)] + [3]
        reused = run(greedy(longer, 5, logprobs=8))
        fresh = model.run(greedy(longer, 5, logprobs=8))
        assert finished(reused).receipt.cached_tokens == len(longer) - 2
        assert tokens(reused) == tokens(fresh)
        assert finished(reused).receipt.decision_hash == finished(fresh).receipt.decision_hash

        again = run(greedy(prompt, TOKENS, logprobs=8, quality="car=0.6"))
        assert tokens(again) == tokens(want)


def test_the_engines_default_threshold(path, delays, want, prompt):
    routing = replace(ROUTING, quality="car=0.6")
    total, _ = slot_bytes(path)
    with local_engine(path, vram=total // 5, ram=0, routing=routing) as engine:
        lossy = list(engine.client.stream(greedy(prompt, TOKENS, logprobs=8)))
        exact = list(engine.client.stream(greedy(prompt, 2, quality="exact")))
    assert tokens(lossy) == tokens(want)
    assert finished(exact).receipt.mode == "exact"


@pytest.mark.parametrize("eviction", ["lfru", "lru", "mass"])
def test_background_reads_are_read_and_change_no_machines_text(
    eviction, path, prompt, delays, local_models
):
    model = local_models["mixed"]
    request = greedy(prompt, TOKENS, quality="price=0.3", logprobs=8)
    rules = {"eviction": eviction, "backfill": Fraction(1, 2), "warmup": 3}
    want = model.run(request, model.sequence(capacity=CAPACITY, **rules))
    plain = model.run(request, model.sequence(capacity=CAPACITY))
    assert finished(want).receipt.decision_hash != finished(plain).receipt.decision_hash
    routing = RoutingConfig(
        car_capacity=CAPACITY, logical_eviction=eviction, backfill="1/2", warmup=3
    )
    for name in ("slow reads", "three devices", "everything resident"):
        with machine(path, delays, routing=routing, **MACHINES[name]) as engine:
            got = list(engine.client.stream(request))
        assert tokens(got) == tokens(want), name
        receipt, expected = finished(got).receipt, finished(want).receipt
        for field in ("decision_hash", "substituted", "lost_mass", "logical_bytes"):
            assert getattr(receipt, field) == getattr(expected, field), (name, field)
        assert sum(receipt.bytes_by_cause.values()) == receipt.nvme_bytes
        assert min(receipt.bytes_by_cause.values()) >= 0
        if name == "three devices":  # a tier of one token's experts has no room for others
            assert 0 < receipt.background_bytes < receipt.nvme_bytes / 2
        elif name == "everything resident":
            assert receipt.background_bytes == 0
