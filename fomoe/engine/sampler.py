"""Draws the next token; depends on (seed, position) and the logits alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt

from fomoe.engine.requests import SamplingParams
from fomoe.errors import EngineError
from fomoe.model.buffers import F32

F64 = npt.NDArray[np.float64]

_NUCLEUS_GUESS = 1024  # candidates sorted first; the nucleus is rarely wider


def sample(
    logits: F32, params: SamplingParams, position: int, prompt: Counter[int], output: Counter[int]
) -> int:
    """Return a token id from logits float32 [V].

    `prompt` and `output` count the tokens so far: the repetition penalty looks at both, presence
    and frequency penalties at the output, as OpenAI defines them. Greedy ties go to the lower id.

    Raises:
        EngineError: the logits hold NaN, +inf or nothing but -inf.
    """
    scores = _penalised(logits, params, prompt, output)
    best = int(np.argmax(scores))  # the first NaN where there is one
    refuse_broken(float(scores[best]), position)
    if params.temperature <= 0.0:
        return best
    wide = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # a vanishing temperature leaves the best alone above -inf
        below = (wide - wide[best]) / params.temperature
    ids, p = _candidates(below, params)
    # A counter-based generator: the draw for a position needs no history, so a stream can be
    # taken up by another process with the same tokens.
    generator = np.random.Generator(
        np.random.Philox(key=params.seed & (2**64 - 1), counter=position)
    )
    cumulative = np.cumsum(p)
    index = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
    return int(ids[min(index, len(ids) - 1)])


def takes_largest(params: SamplingParams) -> bool:
    """Whether a token is the one of the greatest logit, whatever came before it."""
    return params.temperature <= 0.0 and not _touches(params)


def refuse_broken(greatest: float, position: int) -> None:
    """Raise EngineError where the greatest logit of a position is no number."""
    if not math.isfinite(greatest):
        raise EngineError(f"the logits of position {position} are not finite; check the model file")


def log_probabilities(logits: F32, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the natural log probability of `token` and of the `n_top` best (id, value) pairs."""
    wide = logits.astype(np.float64)
    log_sum = float(np.logaddexp.reduce(wide)) if len(wide) < 64 else _log_sum(wide)
    top: list[tuple[int, float]] = []
    if n_top > 0:
        n_top = min(n_top, len(wide))
        top = [(int(i), float(wide[i]) - log_sum) for i in _best(wide, n_top)]
    return float(wide[token]) - log_sum, top


def _log_sum(wide: F64) -> float:
    peak = float(wide.max())
    return peak + float(np.log(np.exp(wide - peak).sum()))


def _touches(params: SamplingParams) -> bool:
    """Whether penalties or a bias change the logits."""
    return (
        bool(params.logit_bias)
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _penalised(
    logits: F32, params: SamplingParams, prompt: Counter[int], output: Counter[int]
) -> F32:
    if not _touches(params):
        return logits
    scores = logits.copy()
    if params.repetition_penalty != 1.0:
        seen = np.fromiter(prompt.keys() | output.keys(), np.int64)
        values = scores[seen]
        penalty = np.float32(params.repetition_penalty)
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        for token, count in output.items():
            scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    return scores


def _candidates(scores: F64, params: SamplingParams) -> tuple[npt.NDArray[np.intp], F64]:
    """Return candidate ids and their weights after top_k, top_p and min_p.

    They stand best first, or by id where neither top_k nor top_p asks for an order: sorting a
    vocabulary of 248,320 takes 30 ms. The greatest score is 0.
    """
    size = len(scores)
    limit = size if params.top_k <= 0 else min(params.top_k, size)
    if limit == size and params.top_p >= 1.0:
        weights = np.exp(scores)
        ids = np.flatnonzero(weights >= params.min_p)  # of the best one's, which is 1
        return ids, weights[ids]
    total = None
    if params.top_p < 1.0 and limit == size > _NUCLEUS_GUESS:
        weights = np.exp(scores)
        total = float(weights.sum())
        head = _best(scores, _NUCLEUS_GUESS)
        if float(weights[head].sum()) >= params.top_p * total:
            limit = _NUCLEUS_GUESS
    ids = _best(scores, limit)
    p = np.exp(scores[ids])
    p /= float(p.sum()) if total is None else total
    if params.top_p < 1.0:
        keep = int(np.searchsorted(np.cumsum(p), params.top_p)) + 1
        ids, p = ids[:keep], p[:keep]
    if params.min_p > 0.0:
        keep = max(1, int(np.count_nonzero(p >= params.min_p * p[0])))
        ids, p = ids[:keep], p[:keep]
    return ids, p


def _best(scores: F64, limit: int) -> npt.NDArray[np.intp]:
    """Return the ids of the `limit` largest scores: by score descending, then id ascending."""
    size = len(scores)
    if limit >= size:
        return np.lexsort((np.arange(size), -scores))
    border = np.partition(scores, size - limit)[size - limit]
    above = np.flatnonzero(scores > border)
    part = np.concatenate([above, np.flatnonzero(scores == border)[: limit - len(above)]])
    return part[np.lexsort((part, -scores[part]))]
