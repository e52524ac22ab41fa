"""The sampler against a slow twin that follows the documented order word by word."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fomoe.engine.requests import SamplingParams
from fomoe.engine.sampler import log_probabilities, sample
from fomoe.errors import EngineError

NOTHING = Counter()


def draw(logits, position=0, prompt=NOTHING, output=NOTHING, **params):
    return sample(logits, SamplingParams(**params), position, prompt, output)


def twin_distribution(logits, params, prompt=NOTHING, output=NOTHING):
    """Probability by token id: penalties and bias, temperature, top_k, top_p, min_p."""
    scores = [float(v) for v in logits]
    for token in set(prompt) | set(output):
        scores[token] *= (
            1 / params.repetition_penalty if scores[token] > 0 else params.repetition_penalty
        )
    for token, count in output.items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    peak = scores[ranked[0]]
    weights = [math.exp((scores[i] - peak) / params.temperature) for i in ranked]
    total = math.fsum(weights)
    kept, mass = [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if kept and mass >= params.top_p:
            break
        kept.append((token, weight / total))
        mass += weight / total
    kept = [(t, p) for t, p in kept if p >= params.min_p * kept[0][1]]
    total = math.fsum(p for _, p in kept)
    return {token: p / total for token, p in kept}


def frequencies(logits, params, draws, **history):
    prompt, output = history.get("prompt", NOTHING), history.get("output", NOTHING)
    return Counter(sample(logits, params, position, prompt, output) for position in range(draws))


def chi_square(counts, expected, draws):
    """Sum over cells of expected count >= 5, the others pooled; (statistic, degrees)."""
    cells = [(counts[t], p * draws) for t, p in expected.items() if p * draws >= 5]
    rest = draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells)
    if rest[1] >= 5:
        cells.append(rest)
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def test_greedy_takes_the_lower_id_of_equal_logits():
    logits = np.array([1, 5, 2, 5, 5], np.float32)
    assert draw(logits, temperature=0.0) == 1
    assert draw(logits, temperature=0.0, logit_bias={4: 0.5}) == 4


def test_greedy_leaves_the_logits_alone():
    logits = np.arange(8, dtype=np.float32)
    before = logits.copy()
    draw(logits, temperature=0.0, logit_bias={3: 9.0}, repetition_penalty=1.5,
         prompt=Counter([1, 2]), output=Counter([7]))  # fmt: skip
    assert np.array_equal(logits, before)


def test_a_draw_depends_on_seed_and_position_alone():
    logits = np.random.default_rng(0).normal(0, 1, 300).astype(np.float32)
    params = SamplingParams(temperature=1.0, seed=11)
    forward = [sample(logits, params, p, NOTHING, NOTHING) for p in range(40)]
    backward = [sample(logits, params, p, NOTHING, NOTHING) for p in reversed(range(40))]
    other = [sample(logits, replace(params, seed=12), p, NOTHING, NOTHING) for p in range(40)]
    assert forward == backward[::-1]
    assert len(set(forward)) > 10
    assert forward != other


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
def test_any_64_bit_seed_works(seed):
    logits = np.zeros(50, np.float32)
    tokens = {draw(logits, position=p, temperature=1.0, seed=seed) for p in range(20)}
    assert len(tokens) > 5


FILTERS = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.6},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p 1": {"min_p": 1.0},
    "all": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {0: 4.0, 5: -100.0, 39: 2.5}, "top_k": 5},
}


@pytest.mark.parametrize("name", FILTERS)
def test_tokens_follow_the_twins_distribution(name):
    logits = np.random.default_rng(5).normal(0, 1.5, 40).astype(np.float32)
    params = SamplingParams(**({"temperature": 1.0, "seed": 3} | FILTERS[name]))
    history = {"prompt": Counter([1, 2, 3]), "output": Counter([3, 3, 4])}
    expected = twin_distribution(logits, params, **history)
    draws = 800
    counts = frequencies(logits, params, draws, **history)
    assert counts.keys() <= expected.keys()
    statistic, degrees = chi_square(counts, expected, draws)
    # Seeds are fixed, so this cannot flicker; 5 sigma of the chi-square distribution.
    assert statistic <= degrees + 5 * math.sqrt(2 * max(degrees, 1))


WIDE = {
    "narrow nucleus": (3.0, {"top_p": 0.5}),
    "nucleus wider than the first guess": (0.1, {"top_p": 0.9}),
    "top_k above the first guess": (0.3, {"top_p": 0.8, "top_k": 2000}),
    "top_k above the vocabulary": (0.3, {"top_p": 0.8, "top_k": 10_000}),
    "top_k alone": (0.1, {"top_k": 1500}),
    "min_p": (0.1, {"top_p": 0.99, "min_p": 0.8}),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_large_vocabulary_is_cut_where_the_twin_cuts_it(name):
    spread, options = WIDE[name]
    logits = np.random.default_rng(8).normal(0, spread, 4000).astype(np.float32)
    params = SamplingParams(**({"temperature": 1.0, "seed": 1} | options))
    expected = twin_distribution(logits, params)
    draws = 300
    counts = frequencies(logits, params, draws)
    assert counts.keys() <= expected.keys()
    # Everything the twin keeps is drawn from: its least likely half is seen as often as it should.
    tail = list(expected)[len(expected) // 2 :]
    mass = sum(expected[t] for t in tail)
    seen = sum(counts[t] for t in tail)
    assert abs(seen - mass * draws) <= 5 * math.sqrt(draws * mass * (1 - mass)) + 1


def test_ties_at_the_border_of_top_k_go_to_lower_ids():
    logits = np.zeros(3000, np.float32)
    logits[[40, 2900]] = 1.0
    seen = {draw(logits, position=p, temperature=1.0, top_k=5) for p in range(300)}
    assert seen == {0, 1, 2, 40, 2900}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = np.random.default_rng(1).normal(0, 8, 600).astype(np.float32)
    got = {draw(logits, position=p, temperature=temperature) for p in range(20)}
    assert got == {int(logits.argmax())}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_and_no_token(value, temperature):
    logits = np.zeros(20, np.float32)
    logits[3] = value
    with pytest.raises(EngineError, match="finite"):
        draw(logits, temperature=temperature)


def test_masked_tokens_are_never_drawn():
    logits = np.full(10, -np.inf, np.float32)
    logits[[2, 7]] = 0.0
    seen = {draw(logits, position=p, temperature=1.0, top_p=0.99) for p in range(60)}
    assert seen == {2, 7}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    assert draw(logits, temperature=0.0, repetition_penalty=1.2, output=Counter([0])) == 1
    assert draw(logits, temperature=0.0, repetition_penalty=1.2, prompt=Counter([0])) == 1
    assert draw(-logits, temperature=0.0, repetition_penalty=1.2, prompt=Counter([3])) == 2


def test_presence_and_frequency_look_at_the_output_alone():
    logits = np.array([1.0, 0.8], np.float32)
    penalties = {"temperature": 0.0, "presence_penalty": 0.1, "frequency_penalty": 0.06}
    assert draw(logits, prompt=Counter([0] * 9), **penalties) == 0
    assert draw(logits, output=Counter([0]), **penalties) == 0  # 1 - 0.16 > 0.8
    assert draw(logits, output=Counter([0, 0]), **penalties) == 1  # 1 - 0.22 < 0.8


@pytest.mark.parametrize("size", [5, 63, 64, 5000])
def test_log_probabilities_are_those_of_a_float64_softmax(size):
    logits = np.random.default_rng(size).normal(0, 10, size).astype(np.float32)
    wide = logits.astype(np.float64)
    exact = wide - wide.max()
    exact -= math.log(math.fsum(np.exp(exact)))
    token = size // 2
    own, top = log_probabilities(logits, token, 4)
    assert own == pytest.approx(exact[token], abs=1e-12)
    order = sorted(range(size), key=lambda i: (-wide[i], i))[:4]
    assert [i for i, _ in top] == order
    assert [p for _, p in top] == pytest.approx(exact[order], abs=1e-12)


def test_alternatives_with_equal_logits_are_the_lower_ids():
    logits = np.zeros(2000, np.float32)
    logits[1500] = 1.0
    _, top = log_probabilities(logits, 0, 4)
    assert [i for i, _ in top] == [1500, 0, 1, 2]


def test_more_alternatives_than_tokens_give_all_of_them():
    own, top = log_probabilities(np.zeros(3, np.float32), 1, 20)
    assert own == pytest.approx(-math.log(3))
    assert [i for i, _ in top] == [0, 1, 2]
    assert log_probabilities(np.zeros(3, np.float32), 1, 0)[1] == []
