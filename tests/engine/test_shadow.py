"""Shadow steps look at a token and leave no trace; contracts hear what they measured."""

import numpy as np
import pytest
from support.local_model import finished, greedy, tokens_of

from fomoe.config import RoutingConfig
from fomoe.engine.contract import KL_EVERY, Contract
from fomoe.engine.requests import TokenEvent
from fomoe.engine.shadow import Shadow, divergence
from fomoe.model.state import Batch, KVCache, TwinState
from fomoe.quality import Quality, parse_quality
from fomoe.routing import ExactRouting
from fomoe.routing.price import NANO, is_sampled

CAPACITY, COUNT = 5, 48


def run(model, prompt, quality, every, **fields):
    """Run a request with one shadow step in `every`; returns the sequence and its events."""
    model_routing = model.routing
    model.routing = RoutingConfig(shadow_every=every)
    try:
        sequence = model.sequence(capacity=CAPACITY)
        request = greedy(prompt, COUNT, quality=quality, logprobs=8, **fields)
        return sequence, model.run(request, sequence)
    finally:
        model.routing = model_routing


def arrays(state):
    """Every byte of a state that later tokens can read."""
    for layer in state.layers:
        if isinstance(layer, KVCache):
            yield layer.k[: state.length]
            yield layer.v[: state.length]
        else:
            yield layer.conv
            yield layer.memory


@pytest.mark.parametrize("quality", ["price=0.2", "car=0.4"])
@pytest.mark.parametrize("every", [1, 5])
def test_they_change_neither_text_nor_decisions_nor_state(model, prompt, quality, every):
    plain, want = run(model, prompt, quality, 0)
    watched, got = run(model, prompt, quality, every)
    assert [e for e in got if isinstance(e, TokenEvent)] == [
        e for e in want if isinstance(e, TokenEvent)
    ]
    a, b = finished(got).receipt, finished(want).receipt
    assert (a.decision_hash, a.substituted, a.lost_mass) == (
        b.decision_hash, b.substituted, b.lost_mass,
    )  # fmt: skip
    assert a.substituted > 20
    for mine, its in zip(arrays(watched.state), arrays(plain.state), strict=True):
        assert np.array_equal(mine, its)
    for layer in range(model.spec.n_layers):
        assert np.array_equal(watched.logical.mask(layer), plain.logical.mask(layer))
    assert (b.shadow_steps, b.shadow_kl, b.estimated_kl) == (0, 0.0, None)
    assert a.shadow_steps == sum(is_sampled(step, every) for step in range(COUNT - 1))
    assert a.shadow_kl > 0.0
    assert a.logical_bytes > b.logical_bytes  # what the twins asked for is counted


def test_a_shadow_step_is_the_exact_step(model, prompt):
    """From an exact state it gives the logits that exact decoding gives."""
    sequence = model.sequence(capacity=CAPACITY)
    generation = model.generation(greedy(prompt, 4), sequence)
    while generation.in_prompt:
        generation.step()
    shadow = Shadow(model.forward, sequence)
    shadow.take()
    before = sequence.logical.hash
    got, missing = shadow.repeat(17)
    got = got.copy()
    assert missing.tolist() == [model.spec.moe.top_k] * model.spec.n_layers  # nothing resident
    assert sequence.logical.hash == before
    assert sequence.state.length == len(prompt)
    sequence.hold(ExactRouting())
    sequence.decoding = True
    model.forward.step(Batch.of([(sequence.state, [17])]), (sequence,))
    want = model.forward.logits(np.array([0]))[0]
    assert np.array_equal(got, want)
    assert divergence(got, want) == 0


def test_the_twin_gives_back_keys_and_values_also_after_an_error(model, prompt):
    sequence = model.sequence()
    model.run(greedy(prompt, 1), sequence)
    caches = [layer for layer in sequence.state.layers if isinstance(layer, KVCache)]
    twin = TwinState(sequence.state)
    twin.take()
    at = sequence.state.length
    for cache in caches:
        cache.k[at], cache.v[at] = 3.0, 4.0

    def try_a_token():
        with twin.borrowed_row():
            for cache in caches:
                cache.k[at], cache.v[at] = -1.0, -1.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        try_a_token()
    assert caches
    assert all((c.k[at] == 3.0).all() and (c.v[at] == 4.0).all() for c in caches)


def test_divergence_against_its_definition():
    rng = np.random.default_rng(0)
    for size in (2, 3, 31, 1000):
        a, b = rng.normal(0, 4, (2, size)).astype(np.float32)
        p = np.exp(a.astype(np.float64)) / np.exp(a.astype(np.float64)).sum()
        q = np.exp(b.astype(np.float64)) / np.exp(b.astype(np.float64)).sum()
        want = float((p * np.log(p / q)).sum())
        # Half a nanonat of rounding, and float64's own over the sums.
        assert divergence(a, b) == pytest.approx(want * NANO, abs=1.0, rel=1e-9)
        assert divergence(a, a) == 0
    banned = np.array([0.0, 1.0, -np.inf], np.float32)
    assert divergence(banned, np.array([1.0, 0.0, 0.0], np.float32)) > 0


def test_exact_answers_have_no_shadow(model, prompt):
    _, events = run(model, prompt, "exact", 1)
    receipt = finished(events).receipt
    assert (receipt.mode, receipt.shadow_steps, receipt.logical_bytes) == ("exact", 0, 0)
    assert tokens_of(events) == tokens_of(model.run(greedy(prompt, COUNT)))


def test_a_loss_is_measured_although_shadows_are_off(model, prompt):
    _, events = run(model, prompt, "kl=0.01", 0)
    receipt = finished(events).receipt
    assert receipt.shadow_steps == sum(is_sampled(step, KL_EVERY) for step in range(COUNT - 1))
    assert receipt.shadow_steps > 0
    assert 0.0 < receipt.price <= 1.0
    assert receipt.mode == "kl=0.01"


def test_a_budget_pays_for_its_shadows(model, prompt):
    _, exact = run(model, prompt, "price=1e-6", 0)
    budget = Quality("bytes", 0.8 * finished(exact).receipt.logical_bytes // (COUNT - 1))
    _, alone = run(model, prompt, str(budget), 0)
    _, shadowed = run(model, prompt, str(budget), 4)
    assert finished(shadowed).receipt.price > finished(alone).receipt.price


def test_contracts_repeat(model, prompt):
    for quality in ("kl=0.005", "bytes=30KB/token"):
        (_, one), (_, two) = (run(model, prompt, quality, 8) for _ in range(2))
        a, b = finished(one).receipt, finished(two).receipt
        assert tokens_of(one) == tokens_of(two)
        assert (a.decision_hash, a.price, a.logical_bytes, a.shadow_kl) == (
            b.decision_hash, b.price, b.logical_bytes, b.shadow_kl,
        )  # fmt: skip


class TestContract:
    """The controller of a request, alone."""

    def test_prices_follow_their_counts(self):
        fixed = Contract(parse_quality("price=0.3"), 4)
        budget = Contract(parse_quality("bytes=100B/token"), 4)
        loss = Contract(parse_quality("kl=0.01"), 4)
        start = budget.price
        for _ in range(3):
            fixed.stepped(10**6, None)
            budget.stepped(200, None)
            loss.stepped(10**6, None)
        assert fixed.price == 0.3
        assert budget.price > start
        before = loss.price
        assert loss.stepped(0, 0) == 0
        assert loss.price > before
        assert loss.stepped(0, 30) == 42  # what earlier steps did to the state is in it
        assert (loss.steps, loss.shadow_steps, loss.loss) == (5, 2, 42)

    def test_what_is_shadowed_depends_on_the_steps_alone(self):
        lossy = Contract(Quality("car", 0.5), 4)
        seen = []
        for _ in range(40):
            seen.append(lossy.is_shadowed)
            lossy.stepped(0, None)
        assert seen == [is_sampled(step, 4) for step in range(40)]
        exact = Contract(Quality(), 1)
        assert not exact.is_shadowed
        assert (exact.price, exact.rule) == (None, ExactRouting())
