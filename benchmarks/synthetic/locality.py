"""What a trace of chosen experts says of caches: LRU hit rates, distinct experts, foresight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
WINDOW = 512  # tokens over which distinct experts are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """Measured over `tokens` decoded tokens and all layers.

    `lru_hits` maps slots per layer to the hit rate of a per-layer LRU; `distinct` counts a layer's
    different experts per 512 tokens; `overlap` is the share of experts that the token before chose
    too; `foresight` is the share of a layer's experts that its router names already when it reads
    the residual stream of the layer before (what prefetching can know).
    """

    tokens: int
    lru_hits: dict[int, float]
    distinct: float
    overlap: float
    foresight: float | None = None

    def text(self) -> str:
        """Return one line for people."""
        hits = ", ".join(f"{rate:.1%} with {slots}" for slots, rate in self.lru_hits.items())
        ahead = "" if self.foresight is None else f"; next layer foreseen {self.foresight:.0%}"
        return (
            f"{self.tokens} tokens: LRU hits {hits} slots per layer; {self.distinct:.0f} distinct "
            f"experts per {WINDOW} tokens; {self.overlap:.0%} kept from token to token{ahead}"
        )


def measure(ids: I32, experts: int, slots: tuple[int, ...], warmup: int) -> Locality:
    """Score a trace int32 [tokens, layers, k]; its first `warmup` tokens only fill the caches."""
    ranks = recency(ids, experts)[warmup:]
    tail = ids[warmup:]
    window = tail[:WINDOW]
    distinct = [len(np.unique(window[:, layer])) for layer in range(ids.shape[1])]
    same = (tail[1:, :, :, None] == tail[:-1, :, None, :]).any(axis=3)
    return Locality(
        tokens=len(tail),
        lru_hits={n: round(float((ranks < n).mean()), 4) for n in slots},
        distinct=float(np.mean(distinct)),
        overlap=round(float(same.mean()), 4),
    )


def recency(ids: I32, experts: int) -> I32:
    """Return how many of the layer's experts were used more recently than each chosen one.

    An LRU of n slots hits where that is below n; an expert never used before gets at least the
    number of experts that were. A token's choices are looked up before any of them counts as used.
    """
    tokens, layers, k = ids.shape
    keys = np.tile(-1 - np.arange(experts), (layers, 1))
    ranks = np.empty(ids.shape, np.int32)
    for token in range(tokens):
        chosen = np.take_along_axis(keys, ids[token], axis=1)
        ranks[token] = (keys[:, None, :] > chosen[:, :, None]).sum(axis=2)
        ranks[token][chosen < 0] = experts
        stamps = np.broadcast_to(token * k + np.arange(k), (layers, k))
        np.put_along_axis(keys, ids[token].astype(np.int64), stamps, axis=1)
    return ranks


def lfru_hits(ids: I32, experts: int, slots: int, warmup: int) -> float:
    """Return the hit rate of a per-layer LFRU of n slots: the least uses / (age + 1) leaves.

    As `fomoe.residency.LFRU`: a token's choices are one step, looked up before any comes in, and
    none of them leaves for another.
    """
    tokens, layers, k = ids.shape
    rows = np.arange(layers)[:, None]
    uses, last = np.zeros((layers, experts)), np.full((layers, experts), -1.0)
    held = np.zeros((layers, experts), bool)
    hits = 0
    for token in range(tokens):
        chosen = ids[token]
        hits += int(held[rows, chosen].sum()) if token >= warmup else 0
        uses[rows, chosen] += 1
        last[rows, chosen] = token
        held[rows, chosen] = True
        worth = np.where(held, uses / (token - last + 1), -1.0)
        worth[rows, chosen] = np.inf
        # At equal worth the lower id leaves first.
        order = np.lexsort((-np.tile(np.arange(experts), (layers, 1)), -worth), axis=1)
        held[rows, order[:, slots:]] = False
    return hits / ((tokens - warmup) * layers * k)
