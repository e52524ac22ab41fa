"""What the closed loop asks of the engine: whole rows of logits, and a null that is harmless."""

import numpy as np
import pytest
from support.local_model import finished, greedy, tokens_of

from fomoe.engine.local import sequence_logits
from fomoe.engine.requests import TokenEvent
from fomoe.errors import RequestError
from fomoe.evaluation.divergence import compare

COUNT = 40


@pytest.fixture(scope="module")
def text():
    return [(11 * i * i + 5 * i + 3) % 300 for i in range(COUNT)]


def rows_of(events):
    rows = [np.frombuffer(e.logits, "<f4") for e in events if isinstance(e, TokenEvent)]
    return np.stack(rows)


def test_rows_are_those_of_the_whole_text_to_the_bit(model, prompt, text):
    events = model.run(greedy(prompt, COUNT, forced=text, logits=True, logprobs=0))
    assert tokens_of(events) == text
    want = sequence_logits(model.forward, model.sequence(), prompt + text, model.chunk)
    np.testing.assert_array_equal(rows_of(events), want[len(prompt) - 1 : -1])


def test_rows_are_those_before_penalties_and_only_on_request(model, prompt):
    plain = model.run(greedy(prompt, 3, logits=True))
    barred = model.run(greedy(prompt, 3, logits=True, min_tokens=3, stop_ids=frozenset({7})))
    np.testing.assert_array_equal(rows_of(plain), rows_of(barred))
    assert all(not e.logits for e in model.run(greedy(prompt, 3)) if isinstance(e, TokenEvent))


def test_the_null_moves_logits_a_little_and_experts_hardly(model, prompt, text):
    ask = {"forced": text, "logits": True}
    exact = rows_of(model.run(greedy(prompt, COUNT, **ask)))
    none = model.run(greedy(prompt, COUNT, null_share=0.0, **ask))
    np.testing.assert_array_equal(rows_of(none), exact)
    spread = []
    for share in (0.05, 1.0):
        run = model.run(greedy(prompt, COUNT, null_share=share, **ask))
        null = rows_of(run)
        np.testing.assert_array_equal(null[0], exact[0])  # the prompt is exact
        scores = compare(exact[1:], null[1:], np.array(text[1:]))
        spread.append(scores.kl.mean())
        assert finished(run).receipt.substituted == 0
    assert 0.0 < spread[0] < spread[1] < 0.05


def test_an_exact_request_does_not_continue_from_a_null(model, prompt):
    sequence = model.sequence()
    answer = tokens_of(model.run(greedy(prompt, 5, null_share=1.0), sequence))
    longer = prompt + answer + [4]
    again = model.run(greedy(longer, 4, logits=True), sequence)
    assert finished(again).receipt.cached_tokens == 0
    np.testing.assert_array_equal(
        rows_of(again), rows_of(model.run(greedy(longer, 4, logits=True)))
    )


def test_the_null_touches_an_answer_under_a_contract_as_well(model, prompt, text):
    """One sequence alone takes another way through the loop than a batch."""
    ask = {"forced": text, "logits": True, "quality": "car=0.4"}
    plain = rows_of(model.run(greedy(prompt, COUNT, **ask), model.sequence(capacity=5)))
    touched = model.run(greedy(prompt, COUNT, null_share=1.0, **ask), model.sequence(capacity=5))
    scores = compare(plain[1:], rows_of(touched)[1:], np.array(text[1:]))
    assert finished(touched).receipt.substituted > 20
    assert scores.kl.mean() > 0.0


@pytest.mark.parametrize("share", [-0.1, 1.5, "half"])
def test_a_share_out_of_range_is_refused(model, prompt, share):
    with pytest.raises(RequestError, match="null_share"):
        model.run(greedy(prompt, 2, null_share=share))
