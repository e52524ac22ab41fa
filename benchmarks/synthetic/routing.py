"""Routing that looks real: expert popularity and choices that persist from token to token.

The text is a run of consecutive token ids. The embedding of id i is a constant direction plus a
state z(i) that drifts as i grows: a third of its dimensions are a slow first-order autoregressive
process (the topic), a third a fast one (the context), the rest white noise. Every router reads all
of them through random rows of its own; the constant direction gives each expert its popularity.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# Popularity of Qwen3.5-397B's experts, as the normal quantile of an expert's frequency among a
# token's choices, by rank out of 512; means over 60 layers (fomoe-397b.freq of
# github.com/pmerolla/fomoe, frequencies below 0.002 taken as that).
_RANKS = (0, 1, 2, 4, 7, 12, 20, 30, 45, 65, 90, 120, 150, 185, 220, 255, 300, 400, 511)
_QUANTILES = (
    -0.33, -0.53, -0.62, -0.75, -0.89, -1.07, -1.25, -1.40, -1.57, -1.74, -1.91, -2.08, -2.22,
    -2.38, -2.57, -2.66, -2.74, -2.88, -2.88,
)  # fmt: skip
_LEAST_FREQUENCY = 0.002
_FREQ_MAGIC = 0x46524551


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Weights of the parts of a router's score, and how long they last (half-lives in tokens).

    The weights of topic, context and noise are scaled to unit variance together; `popularity`
    multiplies the normal quantiles beside them. `constant` is the share of the embedding's root
    mean square that never changes, over the part that does.
    """

    popularity: float = 0.83
    topic: float = 0.52
    topic_half_life: float = 100.0
    context: float = 0.54
    context_half_life: float = 3.0
    noise: float = 0.67
    constant: float = 0.5
    period: int = 8192  # ids after which the text repeats


def embeddings(rng: np.random.Generator, ids: int, hidden: int, drift: Drift) -> F32:
    """Return unit embeddings float32 [ids, hidden] of consecutive ids."""
    state = rng.standard_normal((ids, hidden), dtype=np.float32)
    for part, half_life in ((0, drift.topic_half_life), (1, drift.context_half_life)):
        keep = np.float32(0.5 ** (1 / half_life))
        column = state[:, part::3]
        column[1:] *= np.sqrt(1 - keep**2)
        for i in range(1, ids):
            column[i] += keep * column[i - 1]
    state += np.float32(drift.constant) * signs(hidden)
    return state / np.float32(np.sqrt(1 + drift.constant**2))


def signs(hidden: int) -> F32:
    """Return the constant direction: plus and minus one, float32 [hidden]."""
    return np.random.default_rng(hidden).choice(np.float32([-1, 1]), hidden)


def router(rng: np.random.Generator, popularity: F64, hidden: int, drift: Drift) -> F32:
    """Return router rows float32 [experts, hidden] for normal quantiles of popularity [experts]."""
    rows = rng.standard_normal((len(popularity), hidden), dtype=np.float32)
    weights = np.array([drift.topic, drift.context, drift.noise])
    weights /= np.linalg.norm(weights)
    constant = signs(hidden)
    for part, weight in enumerate(weights):
        column = rows[:, part::3]
        column *= np.float32(weight / np.sqrt(column.shape[1]))
    rows -= np.outer(rows @ constant, constant) / hidden  # it must not make experts popular
    bias = drift.popularity * popularity / (drift.constant * hidden)
    rows += np.outer(bias, constant).astype(np.float32)
    return rows * np.float32(np.sqrt(1 + drift.constant**2))


def fitted_popularity(rng: np.random.Generator, experts: int) -> F64:
    """Return normal quantiles of popularity [experts] by the fitted law, in random order."""
    rank = (np.arange(experts) + 0.5) * 512 / experts - 0.5
    return rng.permutation(np.interp(rank, _RANKS, _QUANTILES))


def measured_popularity(path: Path, layers: int, experts: int) -> F64:
    """Return normal quantiles of popularity [layers, experts] out of a frequency file.

    Format: `<IIII` (magic, version, layers, entries), then `<HHf` (layer, expert, frequency).
    A file of other depth is sampled evenly. Raises ValueError where the experts do not match.
    """
    raw = path.read_bytes()
    magic, _, depth, entries = struct.unpack_from("<IIII", raw)
    if magic != _FREQ_MAGIC:
        raise ValueError(f"{path} is no file of expert frequencies")
    table = np.frombuffer(
        raw, [("layer", "<u2"), ("expert", "<u2"), ("frequency", "<f4")], entries, offset=16
    )
    if int(table["expert"].max()) >= experts:
        raise ValueError(f"{path} names expert {table['expert'].max()}, the shape has {experts}")
    frequency = np.zeros((depth, experts))
    frequency[table["layer"], table["expert"]] = table["frequency"]
    picked = np.rint(np.linspace(0, depth - 1, layers)).astype(int)
    clipped = frequency[picked].clip(_LEAST_FREQUENCY, 0.95)
    return np.vectorize(NormalDist().inv_cdf)(clipped)
