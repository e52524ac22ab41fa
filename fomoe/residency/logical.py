"""The caches that decisions may read: a pure function of each sequence's tokens.

Shape letters: S sequences, L MoE layers, E experts of a layer, T tokens, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.residency import _residency

Eviction = Literal["lru", "lfru", "mass"]

_AGES = 4096  # beyond it all ages count alike
_ONE = 1 << 36  # of the tables, as kDecayBits in logical.cpp
_ONCE = 1 << 16  # a wish, in the counts of lfru
_MASS_UNIT = 1 << 20
_MOST_PARTS = 10**6  # of a read, so that no layer's credit comes near 64 bits
_EXACT_DECAY = Fraction(999, 1000)  # the slowest whose counts fit their bits
_COUNTS = ("missed", "demand", "joined", "background", "substituted", "dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalRules:
    """How logical caches behave; every number is part of what a result depends on.

    Attributes:
        capacity: experts of a layer that are resident at most, at least k.
        eviction: who leaves. `lru`: who ran longest ago. `lfru`: the least count / (age + 1),
            where the count is of tokens that wanted the expert, decayed per token, and the age is
            in tokens since the last of them; an integer product with a table of decay^age /
            (age + 1) in units of 2^-36. `mass`: the least moving average of its probability,
            w += p * 2^20 - (w >> shift). At a tie the lower id leaves.
        decay: of lfru's counts, per token; at most 999/1000.
        shift: of the moving average, 1 to 11; half-life about 0.69 * 2^shift tokens.
        backfill: background reads per layer and token, of wanted experts that did not run, best
            first. Credit that finds none is kept, up to one read; layers start at different parts
            of a read, so that a token's reads are even.
        delay: tokens from a background read to the first that may use it, at least 1.
        warmup: the first so many decoded tokens are routed exactly.
    """

    capacity: int
    eviction: Eviction = "lfru"
    decay: Fraction = Fraction(99, 100)
    shift: int = 6
    backfill: Fraction = Fraction(0)
    delay: int = 2
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.eviction not in get_args(Eviction):
            raise ConfigError(
                f"eviction {self.eviction!r} of a logical cache: choose one of "
                f"{', '.join(get_args(Eviction))}"
            )
        if not 0 < self.decay <= _EXACT_DECAY:
            raise ConfigError(f"decay {self.decay} of counts: give more than 0, at most 999/1000")
        for name, low, high in (("shift", 1, 11), ("delay", 1, 1 << 20), ("warmup", 0, 1 << 40)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} {getattr(self, name)}: give {low} to {high}")
        if self.backfill < 0 or self.backfill.denominator > _MOST_PARTS:
            raise ConfigError(
                f"backfill {self.backfill} per layer and token: give a number >= 0, as a fraction "
                f"of at most {_MOST_PARTS:,} parts"
            )

    @property
    def most_in_flight(self) -> int:
        """Background reads of a layer that can be under way at once."""
        if not self.backfill:
            return 0
        return self.delay * (1 + self.backfill.numerator // self.backfill.denominator)

    def check(self, n_layers: int, n_experts: int) -> None:
        """Raise ConfigError where a model of this shape cannot have such caches.

        The capacity must lie in 1..n_experts and hold the background reads under way; layers and
        experts have at most 16 bits each.
        """
        if not 1 <= self.capacity <= n_experts:
            raise ConfigError(
                f"logical capacity {self.capacity} of {n_experts} experts: choose 1 to {n_experts}"
            )
        if max(n_layers, n_experts) > 1 << 16:
            raise ConfigError(f"{n_layers} layers of {n_experts} experts: at most 65,536 of each")
        if self.most_in_flight > self.capacity:
            raise ConfigError(
                f"{self.most_in_flight} background reads under way do not fit a logical capacity "
                f"of {self.capacity}; lower the backfill or its delay"
            )


@dataclass(frozen=True, slots=True, eq=False)
class LogicalSnapshot:
    """The state of some sequences at one moment; owns its arrays, by `LogicalCaches` attribute."""

    arrays: dict[str, npt.NDArray[np.generic]]

    @property
    def hash(self) -> int:
        """The decision hash of the first sequence."""
        return int(self.arrays["hashes"][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalCounts:
    """Decided activations of all layers and tokens so far, by what became of them.

    `missed` were wanted and not resident. `demand` and `background` are reads; `joined` ran while
    a background read of them was under way and cost no other. `substituted` and `dropped` are
    what the rule did.
    """

    missed: int
    demand: int
    joined: int
    background: int
    substituted: int
    dropped: int


class LogicalCaches:
    """Residency of S sequences in token time; native rules on arrays that this object owns.

    A token's experts are one event: none of them leaves for another of it. An expert that runs
    and is not resident is a demand read and resident at once. How tokens are split into chunks
    and in which order layers come cannot matter.
    """

    def __init__(
        self, n_sequences: int, n_layers: int, n_experts: int, rules: LogicalRules
    ) -> None:
        """Start with nothing resident; ConfigError as in `LogicalRules.check`."""
        rules.check(n_layers, n_experts)
        capacity = rules.capacity
        self.rules = rules
        self.shape = n_sequences, n_layers, n_experts
        cells = n_sequences, n_layers
        self.resident = np.zeros((*cells, n_experts), np.bool_)
        self.members = np.zeros((*cells, capacity), np.int32)
        self.held = np.zeros(cells, np.int32)
        self.weight = np.zeros((*cells, n_experts), np.uint32)
        self.last = np.full((*cells, n_experts), -1, np.int32)
        self.tokens = np.zeros(cells, np.int64)
        self.decoded = np.zeros(cells, np.int64)
        self.hashes = np.zeros(n_sequences, np.uint64)
        self.credit = np.zeros(cells, np.int64)
        self.flight = np.zeros((*cells, rules.most_in_flight), np.int32)
        self.due = np.zeros((*cells, rules.most_in_flight), np.int64)
        self.flying = np.zeros(cells, np.int32)
        self.counters = np.zeros((*cells, len(_COUNTS)), np.int64)
        self.decay, self.quotient = _decay_tables(rules.decay)
        self._set_credit(slice(None))
        self.native = _residency.LogicalCaches(self, rules)

    def _set_credit(self, rows: slice | npt.NDArray[np.intp]) -> None:
        n, per = self.rules.backfill.numerator, self.rules.backfill.denominator
        self.credit[rows] = np.arange(self.shape[1], dtype=np.int64) * n % per

    def mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return a view of what is resident in the layer, bool [S, E]; do not write to it."""
        return self.resident[:, layer]

    def commit(
        self, layer: int, ids: npt.NDArray[np.int32], rows: npt.NDArray[np.int32] | None = None,
        probabilities: npt.NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        """Run tokens exactly, one after the other: the prompt, or whatever no rule decides.

        Args:
            layer: index of the MoE layer.
            ids: int32 [S, T, k], each sequence's next tokens' experts, distinct in a row.
            rows: int32 [S], the sequences, distinct; None: all.
            probabilities: float32 [S, T, E], needed where eviction goes by `mass`.

        Raises:
            ConfigError: a token has more experts than a layer may hold, or `mass` has no
                probabilities.
        """
        check_event(self.rules.capacity, ids.shape[2])
        if self.rules.eviction == "mass" and probabilities is None:
            raise ConfigError("eviction by mass needs the router's probabilities of each token")
        rows = np.arange(self.shape[0], dtype=np.int32) if rows is None else rows
        given = np.zeros((0, 0, 0), np.float32) if probabilities is None else probabilities
        self.native.commit(
            layer, np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(rows, np.int32),
            np.ascontiguousarray(given, np.float32),
        )  # fmt: skip

    def reset(self, rows: npt.NDArray[np.intp] | None = None) -> None:
        """Forget sequences (None: all): nothing resident, no token seen."""
        where = slice(None) if rows is None else rows
        for name in _STATE:
            getattr(self, name)[where] = -1 if name == "last" else 0
        self._set_credit(where)

    def warm(
        self, frequencies: npt.NDArray[np.float32], rows: npt.NDArray[np.intp] | None = None
    ) -> None:
        """Begin sequences (None: all) as if they had seen text with these frequencies.

        The `capacity` most frequent experts of a layer are resident (ties: the lower id); counts
        and averages are what they tend to.

        Args:
            frequencies: float32 [L, E], the share of tokens that want an expert, 0 to 1.
            rows: the sequences.

        Raises:
            ConfigError: the shape is another, or a value is not in 0..1.
        """
        self.reset(rows)
        where = slice(None) if rows is None else rows
        f = np.asarray(frequencies, np.float64)
        if f.shape != self.shape[1:]:
            raise ConfigError(f"a profile of {f.shape} (layers, experts), not {self.shape[1:]}")
        if not ((f >= 0) & (f <= 1)).all():
            raise ConfigError(f"frequencies from {f.min()} to {f.max()}: give shares from 0 to 1")
        order = np.argsort(-f, axis=1, kind="stable").astype(np.int32)
        best = order[:, : self.rules.capacity]
        self.members[where] = best
        self.held[where] = best.shape[1]
        resident = np.zeros(f.shape, np.bool_)
        np.put_along_axis(resident, best, True, axis=1)
        self.resident[where] = resident
        if self.rules.eviction == "lru":
            last = np.empty(f.shape, np.int32)
            np.put_along_axis(last, order, -1 - np.arange(f.shape[1], dtype=np.int32)[None], axis=1)
            self.last[where] = last
        else:
            self.weight[where] = (f * self._unit(f)).astype(np.uint32)

    def _unit(self, f: npt.NDArray[np.float64]) -> float:
        """Return what a frequency of 1 weighs in the long run."""
        if self.rules.eviction == "lfru":
            return _ONCE * float(1 / (1 - self.rules.decay))
        total = float(f.sum(axis=1).max())  # k, of which an expert's share is its probability
        return _MASS_UNIT * 2.0**self.rules.shift / max(total, 1.0)

    def snapshot(self, rows: npt.NDArray[np.intp] | None = None) -> LogicalSnapshot:
        """Return a copy of sequences' state (None: all)."""
        where = slice(None) if rows is None else rows
        return LogicalSnapshot({name: getattr(self, name)[where].copy() for name in _STATE})

    def restore(self, snapshot: LogicalSnapshot, rows: npt.NDArray[np.intp] | None = None) -> None:
        """Put sequences (None: all) into a snapshot's state, of as many or of one sequence."""
        where = slice(None) if rows is None else rows
        for name, values in snapshot.arrays.items():
            getattr(self, name)[where] = values

    def counts(self, rows: npt.NDArray[np.intp] | None = None) -> LogicalCounts:
        """Return the counts of sequences (None: all), added up."""
        chosen = self.counters if rows is None else self.counters[rows]
        return LogicalCounts(**dict(zip(_COUNTS, chosen.sum(axis=(0, 1)).tolist(), strict=True)))


_STATE = (
    "resident", "members", "held", "weight", "last", "tokens", "decoded", "hashes", "credit",
    "flight", "due", "flying", "counters",
)  # fmt: skip
assert [f.name for f in fields(LogicalCounts)] == list(_COUNTS)


class LogicalCache:
    """The logical cache of one sequence: a `LogicalCaches` of one row, in an engine's words."""

    def __init__(self, n_layers: int, n_experts: int, rules: LogicalRules) -> None:
        """Start with nothing resident; errors as in `LogicalCaches`."""
        self.caches = LogicalCaches(1, n_layers, n_experts, rules)
        self.capacity = rules.capacity
        self.tokens = self.caches.tokens[0]
        self.hash_word = self.caches.hashes

    @property
    def hash(self) -> int:
        """The decision hash: 64 bits over all (token, layer, expert) so far, in any order."""
        return int(self.hash_word[0])

    def mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return bool [E]: the resident experts of the layer, a copy."""
        mask: npt.NDArray[np.bool_] = self.caches.resident[0, layer].copy()
        return mask

    def commit(
        self, layer: int, ids: npt.NDArray[np.int32],
        probabilities: npt.NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        """Run the layer's next T tokens exactly; ids int32 [T, k], probabilities float32 [T, E]."""
        given = None if probabilities is None else probabilities[None]
        self.caches.commit(layer, np.asarray(ids)[None], None, given)

    def observe(self, layer: int, ids: npt.NDArray[np.int32]) -> int:
        """Feed the hash with the next T tokens of the layer and leave residency alone.

        Args:
            layer: index of the MoE layer.
            ids: int32 [T, k], distinct in a row, in any order.

        Returns:
            The number of the first of them in the layer.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        return _residency.observe(layer, ids, self.tokens, self.hash_word)

    def snapshot(self) -> LogicalSnapshot:
        """Return a copy of the state."""
        return self.caches.snapshot()

    def restore(self, snapshot: LogicalSnapshot) -> None:
        """Go back to a snapshot of this cache or of one of the same shape."""
        self.caches.restore(snapshot)


def check_event(capacity: int, k: int) -> None:
    """Raise ConfigError where a token's k experts do not fit a logical cache."""
    if k > capacity:
        raise ConfigError(
            f"logical capacity {capacity}: at least {k}, the experts of one token, are needed"
        )


def _decay_tables(decay: Fraction) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return decay^age and decay^age / (age + 1) in units of 2^-36, rounded down step by step."""
    powers, value = [], _ONE
    for _ in range(_AGES):
        powers.append(value)
        value = value * decay.numerator // decay.denominator
    quotients = [power // (age + 1) for age, power in enumerate(powers)]
    return np.array(powers, np.uint64), np.array(quotients, np.uint64)
