"""Cache-aware routing in the loop: a function of the sequence's own tokens, decode only."""

import numpy as np
import pytest
from support.local_model import finished, greedy, tokens_of

from fomoe.engine.brain import Brain
from fomoe.engine.requests import PromptLogprobs, TokenEvent
from fomoe.model.state import Batch
from fomoe.routing import CacheAwareRouting, route_exact

CAPACITY = 5


def lossy(prompt, count=24, **fields):
    return greedy(prompt, count, **({"quality": "car=0.6", "logprobs": 8} | fields))


def test_it_substitutes_and_reports_so(model, prompt):
    exact = model.run(greedy(prompt, 24))
    run = model.run(lossy(prompt), model.sequence(capacity=CAPACITY))
    receipt = finished(run).receipt
    assert receipt.substituted > 20
    assert 0.0 < receipt.lost_mass < receipt.substituted
    assert (receipt.mode, receipt.logical_capacity) == ("car=0.6", CAPACITY)
    assert receipt.decision_hash != finished(exact).receipt.decision_hash
    plain = finished(exact).receipt
    assert (plain.substituted, plain.lost_mass) == (0, 0.0)
    assert (plain.mode, plain.logical_capacity) == ("exact", 0)


@pytest.mark.parametrize("chunk", [1, 7])
def test_prompt_chunks_do_not_matter(model, prompt, chunk, monkeypatch):
    want = model.run(lossy(prompt), model.sequence(capacity=CAPACITY))
    monkeypatch.setattr(model, "chunk", chunk)
    got = model.run(lossy(prompt), model.sequence(capacity=CAPACITY))
    assert [e for e in got if isinstance(e, TokenEvent)] == [
        e for e in want if isinstance(e, TokenEvent)
    ]
    a, b = finished(got).receipt, finished(want).receipt
    assert (a.decision_hash, a.substituted, a.lost_mass) == (
        b.decision_hash, b.substituted, b.lost_mass,
    )  # fmt: skip


def test_what_ran_before_does_not_matter(model, prompt):
    sequence = model.sequence(capacity=CAPACITY)
    model.run(lossy(prompt[::-1], 9), sequence)
    again = model.run(lossy(prompt), sequence)
    fresh = model.run(lossy(prompt), model.sequence(capacity=CAPACITY))
    assert tokens_of(again) == tokens_of(fresh)
    assert finished(again).receipt.decision_hash == finished(fresh).receipt.decision_hash
    assert finished(again).receipt.cached_tokens == 0


def test_the_prompt_is_exact(model, prompt):
    request = lossy(prompt, 1, echo=True)
    got = model.run(request, model.sequence(capacity=CAPACITY))
    want = model.run(greedy(prompt, 1, echo=True, logprobs=8))
    for kind in (PromptLogprobs, TokenEvent):
        assert [e for e in got if isinstance(e, kind)] == [e for e in want if isinstance(e, kind)]
    assert finished(got).receipt.substituted == 0


def test_an_exact_request_does_not_continue_from_a_lossy_state(model, prompt):
    sequence = model.sequence(capacity=CAPACITY)
    answer = tokens_of(model.run(lossy(prompt), sequence))
    longer = prompt + answer + [4]
    again = model.run(greedy(longer, 6, logprobs=3), sequence)
    fresh = model.run(greedy(longer, 6, logprobs=3))
    assert finished(again).receipt.cached_tokens == 0
    assert [e for e in again if isinstance(e, TokenEvent)] == [
        e for e in fresh if isinstance(e, TokenEvent)
    ]
    assert finished(again).receipt.decision_hash == finished(fresh).receipt.decision_hash


def test_an_exact_request_does_not_continue_from_a_priced_one(model, prompt):
    """Prices are part of the decision hash, also where they substitute nothing."""
    sequence = model.sequence(capacity=CAPACITY)
    priced = model.run(lossy(prompt, 5, quality="price=1e-9"), sequence)
    assert finished(priced).receipt.substituted == 0
    longer = prompt + tokens_of(priced) + [4]
    again = model.run(greedy(longer, 6), sequence)
    fresh = model.run(greedy(longer, 6))
    assert finished(again).receipt.decision_hash == finished(fresh).receipt.decision_hash


def test_nothing_is_substituted_where_everything_is_resident(model):
    full = model.sequence(capacity=model.spec.moe.n_experts)
    warm = [(11 * i) % 300 for i in range(110)]
    run = model.run(lossy(warm, 5, quality="car=0.01"), full)
    assert all(full.logical.mask(layer).all() for layer in range(model.spec.n_layers))
    assert finished(run).receipt.substituted == 0
    exact = model.run(greedy(warm, 5, logprobs=8))
    assert [e for e in run if isinstance(e, TokenEvent)] == [
        e for e in exact if isinstance(e, TokenEvent)
    ]


class TestBrain:
    """Routes against the pure rules, for a batch of an exact and a lossy sequence."""

    def setup_method(self):
        self.rng = np.random.default_rng(3)

    def scores(self, rows, n_experts):
        return self.rng.normal(0, 2, (rows, n_experts)).astype(np.float32)

    def test_only_decoding_lossy_sequences_are_substituted(self, model):
        n, k = model.spec.moe.n_experts, model.spec.moe.top_k
        brain = Brain(k)
        exact, decoding, prompting = (model.sequence(capacity=CAPACITY) for _ in range(3))
        decoding.hold(CacheAwareRouting(0.2))
        prompting.hold(CacheAwareRouting(0.2))
        decoding.decoding = exact.decoding = True
        total = 0
        for _ in range(12):
            scores = self.scores(3, n)
            batch = Batch.of([(s.state, [0]) for s in (exact, decoding, prompting)])
            mask = decoding.logical.mask(2)
            route = brain.route(2, scores, batch, (exact, decoding, prompting))
            plain = route_exact(scores, k)
            want = CacheAwareRouting(0.2).route(scores[1:2], k, mask)
            for row in (0, 2):
                assert np.array_equal(route.ids[row], plain.ids[row])
                assert np.array_equal(route.weights[row], plain.weights[row])
                assert not route.substituted[row].any()
            assert np.array_equal(route.ids[1], want.ids[0])
            assert np.array_equal(route.weights[1], want.weights[0])
            total += int(want.substituted.sum())
            assert brain.loss.substituted == total
        assert total > 0
        assert (exact.lossy, decoding.lossy, prompting.lossy) == (False, True, False)

    def test_the_lossy_cache_learns_what_ran_and_the_exact_one_only_hashes(self, model):
        n, k = model.spec.moe.n_experts, model.spec.moe.top_k
        brain = Brain(k)
        exact, lossy_one = model.sequence(capacity=CAPACITY), model.sequence(capacity=CAPACITY)
        lossy_one.hold(CacheAwareRouting(0.01))
        lossy_one.decoding = True
        for _ in range(5):
            scores = self.scores(2, n)
            batch = Batch.of([(exact.state, [0]), (lossy_one.state, [0])])
            route = brain.route(0, scores, batch, (exact, lossy_one))
            assert lossy_one.logical.mask(0)[route.ids[1]].all()
        assert not exact.logical.mask(0).any()
        assert exact.logical.hash != 0
        assert exact.logical.hash != lossy_one.logical.hash
