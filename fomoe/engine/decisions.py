"""Which experts run, for many sequences at once: a routing rule over logical caches.

Shape letters: S rows, one sequence each; E experts of a layer; k experts per token; C experts of
a trace's row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from fomoe.engine import _engine
from fomoe.errors import ConfigError
from fomoe.residency.logical import LogicalCaches, check_event
from fomoe.routing.router import refuse_broken
from fomoe.routing.rules import RoutingRule

TALLIES = 3

_F32 = npt.NDArray[np.float32]
_I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """What one token of a layer runs, by row; arrays of the `Decider` until its next call.

    Attributes:
        ids: int32 [S, k], the experts that run, best first; -1 for a dropped one.
        weights: float32 [S, k].
        substituted: bool [S, k], the router did not choose it.
        read: bool [S, k], a demand read; what joins a background read under way is none.
        wanted: int32 [S, k], the router's own choice, best first.
        background: int32 [S, k], background reads asked for now, -1 behind the last.
        lost: float32 [S], the part of the wanted weight that does not run, before any of it is
            given back.
        tally: int64 [S, 3], demand reads, background reads and substitutes.
    """

    ids: _I32
    weights: _F32
    substituted: npt.NDArray[np.bool_]
    read: npt.NDArray[np.bool_]
    wanted: _I32
    background: _I32
    lost: _F32
    tally: npt.NDArray[np.int64]

    def first(self, rows: int) -> Decisions:
        """Return views of the first rows."""
        return Decisions(**{part.name: getattr(self, part.name)[:rows] for part in fields(self)})

    @classmethod
    def empty(cls, rows: int, k: int) -> Decisions:
        """Return arrays for so many rows."""
        shape = rows, k
        return cls(
            ids=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
            substituted=np.zeros(shape, np.bool_),
            read=np.zeros(shape, np.bool_),
            wanted=np.zeros(shape, np.int32),
            background=np.zeros(shape, np.int32),
            lost=np.zeros(rows, np.float32),
            tally=np.zeros((rows, TALLIES), np.int64),
        )


class Decider:
    """Decides tokens layer by layer; each decision advances its sequence's logical cache.

    A sequence's decisions depend on its own scores and cache alone, whatever its neighbours in a
    call, the number of threads, and the order of layers.
    """

    def __init__(
        self, rule: RoutingRule, caches: LogicalCaches, k: int, *, threads: int = 1
    ) -> None:
        """Bind a rule to caches.

        Args:
            rule: what chooses.
            caches: residency, advanced by each decision.
            k: experts per token.
            threads: rows are spread over so many; each call starts and joins them.

        Raises:
            ConfigError: k does not fit the caches, or the rule has sensitivities of another
                number of layers.
        """
        check_event(caches.rules.capacity, k)
        n_layers = caches.shape[1]
        given = len(getattr(rule, "sensitivities", ()))
        if given not in (0, n_layers):
            raise ConfigError(f"{given} layer sensitivities for {n_layers} layers")
        if threads < 1:
            raise ConfigError(f"{threads} threads: give at least 1")
        self.rule = rule
        self.caches = caches
        self.k = k
        self.out = Decisions.empty(caches.shape[0], k)
        self.native = _engine.Decider(caches.native, rule.native, k, threads, self.out)
        self._all = np.arange(caches.shape[0], dtype=np.int32)

    def decide(
        self, layer: int, scores: _F32, rows: _I32 | None = None, prices: _F32 | None = None,
        out: Decisions | None = None,
    ) -> Decisions:  # fmt: skip
        """Decide the next token of a layer for some sequences.

        Args:
            layer: index of the MoE layer.
            scores: float32 [S, E], router scores.
            rows: int32 [S], the sequences, all different; None: the first S.
            prices: float32 [S], in place of the rule's own price (or threshold, or weight).
            out: where the decisions go, of S rows; None: arrays of the decider.

        Raises:
            EngineError: a row of scores is not finite; nothing is decided then.
        """
        return self._run(layer, scores, None, (rows, prices, out))

    def decide_compact(
        self, layer: int, ids: _I32, probabilities: _F32, rows: _I32 | None = None,
        prices: _F32 | None = None, out: Decisions | None = None,
    ) -> Decisions:  # fmt: skip
        """Decide from the head of each row, as traces have it.

        Only experts of the head can run; with eviction by mass those behind it count as 0.

        Args:
            layer: index of the MoE layer.
            ids: int32 [S, C], experts in the router's order, C >= k.
            probabilities: float32 [S, C], theirs; finite.
            rows: as in `decide`.
            prices: as in `decide`.
            out: as in `decide`.
        """
        return self._run(layer, probabilities, ids, (rows, prices, out))

    def _run(
        self, layer: int, scores: _F32, ids: _I32 | None,
        given: tuple[_I32 | None, _F32 | None, Decisions | None],
    ) -> Decisions:  # fmt: skip
        rows, prices, out = given
        n = len(scores)
        if rows is None:
            rows = self._all[:n]
        broken = self.native.decide(layer, scores, ids, rows, prices, out)
        refuse_broken(broken, n)
        if out is not None:
            return out
        return self.out if n == len(self._all) else self.out.first(n)
