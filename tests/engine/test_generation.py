"""One request at a time over resident experts: what ends it, what it reports, what it refuses."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from support.local_model import finished, greedy, tokens_of

from fomoe.engine.local import local_logits
from fomoe.engine.requests import PromptLogprobs, PromptProgress, SamplingParams, TokenEvent
from fomoe.errors import EngineError, RequestError


@pytest.fixture(scope="module")
def free_run(model, prompt):
    """The greedy continuation that nothing ends but max_tokens."""
    return tokens_of(model.run(greedy(prompt, 20)))


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_greedy_decode_follows_the_argmax_of_the_logits(model_path, prompt, free_run):
    logits = local_logits(model_path, prompt + free_run, chunk=64)
    want = logits[len(prompt) - 1 : -1].argmax(axis=1)
    assert free_run == want.tolist()
    assert len(set(free_run)) > 5  # a model that repeats itself would hide mistakes


@pytest.mark.parametrize("count", [1, 2, 5])
def test_max_tokens_ends_the_answer(model, prompt, free_run, count):
    events = model.run(greedy(prompt, count))
    assert tokens_of(events) == free_run[:count]
    end = finished(events)
    assert (end.reason, end.stop_id, end.error) == ("length", None, None)
    assert end.receipt.generated_tokens == count
    assert end.receipt.prompt_tokens == len(prompt)


def test_no_tokens_at_all(model, prompt):
    events = model.run(greedy(prompt, 0))
    assert tokens_of(events) == []
    assert finished(events).reason == "length"


def test_a_stop_token_is_reported_and_not_emitted(model, prompt, free_run):
    stop = free_run[6]
    events = model.run(greedy(prompt, 20, stop_ids=frozenset({stop, 299})))
    assert tokens_of(events) == free_run[: free_run.index(stop)]
    end = finished(events)
    assert (end.reason, end.stop_id) == ("stop", stop)


def test_min_tokens_keeps_the_stop_token_out(model, prompt, free_run):
    stop = free_run[2]
    first = free_run.index(stop)
    request = greedy(prompt, 12, stop_ids=frozenset({stop}), min_tokens=first + 4)
    tokens = tokens_of(model.run(request))
    assert len(tokens) >= first + 4
    assert stop not in tokens
    assert tokens[:first] == free_run[:first]


def test_forced_tokens_are_fed_in_place_of_sampled_ones(model, prompt, free_run):
    forced = [token + 1 for token in free_run[:3]]
    tokens = tokens_of(model.run(greedy(prompt, 8, forced=forced)))
    assert tokens[:3] == forced
    assert tokens[3:] == tokens_of(model.run(greedy(prompt + forced, 5)))


@pytest.mark.parametrize("room", [0, 1, 4])
def test_a_full_context_ends_the_answer(model, prompt, free_run, room):
    sequence = model.sequence(ctx=len(prompt) + room)
    events = model.run(greedy(prompt, 20), sequence)
    # The last token needs no place of its own: nothing comes after it.
    assert tokens_of(events) == free_run[: room + 1]
    assert finished(events).reason == "length"
    assert sequence.state.length <= sequence.state.ctx_size


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_progress_counts_up_to_the_prompt(model, prompt, chunk, monkeypatch):
    monkeypatch.setattr(model, "chunk", chunk)
    events = model.run(greedy(prompt, 1))
    progress = [e for e in events if isinstance(e, PromptProgress)]
    steps = [min(n, len(prompt)) for n in range(chunk, len(prompt) + chunk, chunk)]
    assert [e.processed for e in progress] == steps
    assert {(e.total, e.cached) for e in progress} == {(len(prompt), 0)}
    assert all(a.time_ms <= b.time_ms for a, b in itertools.pairwise(progress))


def test_logprobs_are_the_log_softmax_of_the_logits(model, model_path, prompt):
    events = model.run(greedy(prompt, 6, logprobs=4))
    tokens = tokens_of(events)
    exact = log_softmax(local_logits(model_path, prompt + tokens)[len(prompt) - 1 : -1])
    for row, event in zip(exact, [e for e in events if isinstance(e, TokenEvent)], strict=True):
        assert event.logprob == pytest.approx(row[event.token], abs=1e-12)
        best = np.argsort(-row, kind="stable")[:4]
        assert [i for i, _ in event.top] == best.tolist()
        assert [p for _, p in event.top] == pytest.approx(row[best].tolist(), abs=1e-12)


def test_logprobs_zero_and_none(model, prompt):
    own = next(e for e in model.run(greedy(prompt, 1, logprobs=0)) if isinstance(e, TokenEvent))
    assert own.logprob is not None
    assert own.top == []
    none = next(e for e in model.run(greedy(prompt, 1)) if isinstance(e, TokenEvent))
    assert none.logprob is None


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_scores_every_prompt_token_but_the_first(model, model_path, prompt, max_tokens):
    events = model.run(greedy(prompt, max_tokens, echo=True, logprobs=2))
    (echo,) = [e for e in events if isinstance(e, PromptLogprobs)]
    exact = log_softmax(local_logits(model_path, prompt))
    assert echo.logprobs[0] is None
    assert echo.top[0] == []
    assert len(echo.logprobs) == len(echo.top) == len(prompt)
    for place in range(1, len(prompt)):
        row = exact[place - 1]
        assert echo.logprobs[place] == pytest.approx(row[prompt[place]], abs=1e-12)
        assert [i for i, _ in echo.top[place]] == np.argsort(-row, kind="stable")[:2].tolist()
    kinds = [type(e) for e in events]
    assert PromptLogprobs in kinds
    if max_tokens:
        assert kinds.index(PromptLogprobs) < kinds.index(TokenEvent)


def test_echo_of_one_token(model):
    events = model.run(greedy([5], 0, echo=True))
    (echo,) = [e for e in events if isinstance(e, PromptLogprobs)]
    assert (echo.logprobs, echo.top) == ([None], [[]])


def test_sampling_uses_the_position_so_a_stream_can_be_taken_up(model, prompt):
    sampling = SamplingParams(temperature=1.2, top_k=20, seed=9)
    whole = tokens_of(model.run(greedy(prompt, 12, sampling=sampling)))
    rest = tokens_of(model.run(greedy(prompt + whole[:5], 7, sampling=sampling)))
    assert rest == whole[5:]
    other = tokens_of(model.run(greedy(prompt, 12, sampling=replace(sampling, seed=10))))
    assert other != whole


def test_penalties_see_prompt_and_output(model, prompt):
    sampling = SamplingParams(temperature=0.0, presence_penalty=50.0)
    tokens = tokens_of(model.run(greedy(prompt, 15, sampling=sampling)))
    assert max(Counter(tokens).values()) == 1
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1e6)
    assert not set(tokens_of(model.run(greedy(prompt, 1, sampling=sampling)))) & set(prompt)


def test_cancel_ends_with_what_was_done(model, prompt, free_run):
    sequence = model.sequence()
    generation = model.generation(greedy(prompt, 20), sequence)
    events = []
    while len(tokens_of(events)) < 3:
        events += generation.step()
    end = generation.cancel()
    assert end.reason == "cancelled"
    assert generation.finished
    assert end.receipt.generated_tokens == 3
    # The text so far is a prefix that an exact request may continue from.
    assert sequence.tokens == prompt + free_run[:2]


def test_a_failed_request_leaves_nothing_to_continue_from(model, prompt, free_run):
    sequence = model.sequence()
    generation = model.generation(greedy(prompt, 20), sequence)
    generation.step()
    end = generation.fail("the disk is on fire")
    assert (end.reason, end.error) == ("error", "the disk is on fire")
    assert (sequence.tokens, sequence.state.length) == ([], 0)
    events = model.run(greedy(prompt, 5), sequence)
    assert tokens_of(events) == free_run[:5]


class TestPrefixReuse:
    def test_a_longer_text_goes_on_from_the_state(self, model, prompt, free_run):
        sequence = model.sequence()
        model.run(greedy(prompt, 5), sequence)
        longer = prompt + free_run[:5] + [1, 2, 3]
        again = model.run(greedy(longer, 8, logprobs=5), sequence)
        fresh = model.run(greedy(longer, 8, logprobs=5))
        assert finished(again).receipt.cached_tokens == len(prompt) + 4
        assert finished(fresh).receipt.cached_tokens == 0
        tokens = [[e for e in run if isinstance(e, TokenEvent)] for run in (again, fresh)]
        assert tokens[0] == tokens[1]
        assert finished(again).receipt.decision_hash == finished(fresh).receipt.decision_hash
        assert next(e for e in again if isinstance(e, PromptProgress)).cached == len(prompt) + 4

    @pytest.mark.parametrize("change", ["same", "shorter", "other", "echo"])
    def test_anything_else_starts_afresh(self, model, prompt, change):
        sequence = model.sequence()
        model.run(greedy(prompt, 5), sequence)
        held = list(sequence.tokens)
        text = {
            "same": held, "shorter": prompt, "other": [9, *held[1:], 4], "echo": [*held, 4]
        }[change]  # fmt: skip
        request = greedy(text, 4, echo=change == "echo", logprobs=3)
        again, fresh = model.run(request, sequence), model.run(request)
        assert finished(again).receipt.cached_tokens == 0
        tokens = [[e for e in run if isinstance(e, TokenEvent)] for run in (again, fresh)]
        assert tokens[0] == tokens[1]
        assert finished(again).receipt.decision_hash == finished(fresh).receipt.decision_hash


REFUSED = {
    "no prompt": ({"prompt": []}, "prompt", "no tokens"),
    "prompt too long": ({"prompt": [1] * 129}, "prompt", "129"),
    "token too large": ({"prompt": [1, 300]}, "prompt", "300"),
    "token negative": ({"prompt": [-1, 5]}, "prompt", "-1"),
    "bias too large": ({"sampling": SamplingParams(logit_bias={300: 1.0})}, "logit_bias", "300"),
    "bias negative": ({"sampling": SamplingParams(logit_bias={-2: 1.0})}, "logit_bias", "-2"),
    "bias not a number": (
        {"sampling": SamplingParams(logit_bias={3: math.nan})}, "logit_bias", "nan",
    ),
    "bias without end": (
        {"sampling": SamplingParams(logit_bias={3: math.inf})}, "logit_bias", "inf",
    ),
    "stop id too large": ({"stop_ids": frozenset({300})}, "stop_ids", "300"),
    "stop id negative": ({"stop_ids": frozenset({-3})}, "stop_ids", "-3"),
    "forced id too large": ({"forced": [3, 300]}, "forced", "300"),
    "temperature below zero": (
        {"sampling": SamplingParams(temperature=-0.5)}, "temperature", "-0.5",
    ),
    "top_p above one": ({"sampling": SamplingParams(top_p=1.1)}, "top_p", "1.1"),
    "min_p not a number": ({"sampling": SamplingParams(min_p=math.nan)}, "min_p", "nan"),
    "no repetition penalty": (
        {"sampling": SamplingParams(repetition_penalty=0.0)}, "repetition_penalty", "0.0",
    ),
    "token that is text": ({"prompt": [3, "4"]}, "prompt", "whole numbers"),
    "no max_tokens": ({"max_tokens": None}, "max_tokens", "None"),
    "max_tokens below zero": ({"max_tokens": -1}, "max_tokens", "-1"),
    "min_tokens not whole": ({"min_tokens": 1.5}, "min_tokens", "1.5"),
    "logprobs that are text": ({"logprobs": "all"}, "logprobs", "all"),
    "seed that is text": ({"sampling": SamplingParams(seed="x")}, "seed", "x"),
    "temperature that is text": (
        {"sampling": SamplingParams(temperature="hot")}, "temperature", "hot",
    ),
    "quality out of range": ({"quality": "car=1.5"}, "quality", "1.5"),
    "quality unknown": ({"quality": "best"}, "quality", "best"),
    "quality not a text": ({"quality": 0.5}, "quality", "0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_run_is_refused_and_costs_nothing(model, prompt, name):
    fields, param, number = REFUSED[name]
    sequence = model.sequence(ctx=128)
    model.run(greedy(prompt, 2), sequence)
    held = list(sequence.tokens)
    with pytest.raises(RequestError, match=number) as refusal:
        model.generation(greedy(**({"prompt": prompt, "max_tokens": 4} | fields)), sequence)
    assert refusal.value.param == param
    assert sequence.tokens == held


def test_a_prompt_that_just_fits_is_taken(model):
    events = model.run(greedy([1] * 128, 4), model.sequence(ctx=128))
    assert len(tokens_of(events)) == 1


def test_broken_logits_end_the_request_with_an_error(model, prompt, monkeypatch):
    logits = model.forward.model.logits
    monkeypatch.setattr(model.forward.model, "logits", lambda x, rows: logits(x, rows) * np.nan)
    with pytest.raises(EngineError, match="not finite"):
        model.run(greedy(prompt, 3))
