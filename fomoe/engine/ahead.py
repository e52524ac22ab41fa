"""Look-ahead in decode: how sure a guess must be before its expert is read, by what guesses were.

A later layer's router, applied to the present hidden state, names the experts that it will want. A
guess is an expert named that lies in no tier; its *level* says how far its probability lies above
that of the first expert not chosen. What became of guesses is counted by level, also of those that
were not read: how often such a guess comes true on a miss, which is what counts, since what is easy
to foresee is resident already.

Two things bound what is read. The *budget*: reads in vain may not add more than a share of the
bytes that would be read without them; each is charged twice, for itself and for what it displaced,
when it is asked for, and paid back when it is wanted (`ahead.cpp`, read by read). And the
*governor*, which once a token weighs the time that a read can gain against what it costs when it
is in vain. Guesses change where experts lie and when they come, never what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.storage.fetch import PREFETCH_PIECE_BYTES

DEPTHS, LEVELS = 2, 8
_CHARGE = 2  # for a read in vain, see above: kCharge of ahead.h
LEAST_COUNT = 16  # guesses of a level before it is trusted or not
WINDOW = 4096  # guesses after which all counts are halved
_FRESH = 1 / 8  # weight of the last token in a mean time
PROBE_TOKENS = 16  # how often a look is taken while none pays
# Stalls below this share of the time are not worth a router product per layer.
LEAST_STALL = 0.05
_PIECES_UNDER_WAY = 2  # what a demand read may have to wait for


class AheadArrays:
    """What native code and the governor share.

    Attributes:
        named: int64 [depths, levels], guesses that were put to the test.
        wanted: int64 [depths, levels], those that came true.
        allowed: bool [depths, levels], which guesses are read.
        charged: bool [L, E], experts that a guess asked for, until they are wanted.
        misses: int64 [1], wanted experts that lay in no tier before anybody guessed.
        credit: int64 [1], bytes that guesses may still waste.
        budget_permille: what is added to the credit for a byte that is wanted, in thousandths.
    """

    def __init__(self, n_layers: int, n_experts: int, budget: float) -> None:
        self.named = np.zeros((DEPTHS, LEVELS), np.int64)
        self.wanted = np.zeros((DEPTHS, LEVELS), np.int64)
        self.allowed = np.zeros((DEPTHS, LEVELS), np.bool_)
        self.charged = np.zeros((n_layers, n_experts), np.bool_)
        self.misses = np.zeros(1, np.int64)
        self.credit = np.zeros(1, np.int64)
        self.budget_permille = round(1000 * budget)


@dataclass(slots=True)
class _Means:
    """Running means per layer, in seconds; `read` is of one expert."""

    layer: float = 0.0
    window: float = 0.0
    stall: float = 0.0
    read: float = 0.0
    used: float = 0.0  # guesses that came true, per layer


class Governor:
    """Decides once a token how far to look ahead and which guesses are read.

    Args:
        arrays: the counts, which native code keeps.
        depth: most layers to look ahead, 0 to 2.
        expert_bytes: of a typical expert.
    """

    def __init__(self, arrays: AheadArrays, *, depth: int, expert_bytes: int) -> None:
        self.arrays = arrays
        # Without a budget no guess is ever read, and scoring them costs a product per layer.
        self.depth = self._most = depth if arrays.budget_permille else 0
        self._in_vain = min(1.0, _PIECES_UNDER_WAY * PREFETCH_PIECE_BYTES / max(1, expert_bytes))
        self._budget = arrays.budget_permille / 1000
        self._means = _Means()
        self._tokens = 0
        self._clear()

    def _clear(self) -> None:
        self._layers = self._used = self._reads = 0
        self._window_s = self._stall_s = self._took_s = self._read_s = 0.0

    def reach(self, depth: int) -> None:
        """Look at most so many layers ahead from now on, 0 to 2."""
        if not 0 <= depth <= DEPTHS:
            raise ConfigError(f"looking {depth} layers ahead: choose 0 to {DEPTHS}")
        self.depth = self._most = depth

    def refund(self, layer: int, expert: int, nbytes: int) -> bool:
        """A prefetch was never read; returns whether it was a guess of a decode step.

        What made room for it may be wanted again, which stays charged.
        """
        was_guessed = bool(self.arrays.charged[layer, expert])
        if was_guessed:
            self.arrays.charged[layer, expert] = False
            self.arrays.credit += nbytes
        return was_guessed

    def came_true(self, layer: int, experts: npt.NDArray[np.int32], nbytes: int) -> None:
        """A prompt wants experts int32 [n] that were prefetched: pay back those of decode steps."""
        charged = self.arrays.charged[layer]
        self.arrays.credit += _CHARGE * nbytes * np.count_nonzero(charged[experts])
        charged[experts] = False

    def leave(self, layer: int, expert: int) -> None:
        """A prompt has an expert read ahead: what a decode step paid for it before is spent."""
        self.arrays.charged[layer, expert] = False

    def step(self, window_s: float, took_s: float, stall_s: float, reads: int, used: int) -> None:
        """Take note of a layer.

        Args:
            window_s: from the end of the layer before to this one's reads: nothing is demanded.
            took_s: from its reads to its end.
            stall_s: how long the device waited for bytes in that time.
            reads: experts that were asked for, as demand.
            used: of those that the step wants, how many a guess had asked for.
        """
        self._layers += 1
        self._window_s += window_s
        self._took_s += took_s
        self._stall_s += stall_s
        self._used += used
        if stall_s > 0 and reads > 0:  # the reads took longer than what was computed meanwhile
            self._reads += reads
            self._read_s += took_s

    def token(self) -> None:
        """End a token: choose what the next one reads ahead."""
        if not self._layers or not self._most:
            return
        self._tokens += 1
        self._average()
        self._choose()
        self._clear()

    def _average(self) -> None:
        means, n, fresh = self._means, self._layers, _FRESH if self._tokens > 1 else 1.0
        means.window += fresh * (self._window_s / n - means.window)
        means.layer += fresh * ((self._window_s + self._took_s) / n - means.layer)
        means.stall += fresh * (self._stall_s / n - means.stall)
        means.used += fresh * (self._used / n - means.used)
        if self._reads:
            fresh = fresh if means.read else 1.0
            means.read += fresh * (self._read_s / self._reads - means.read)

    def _choose(self) -> None:
        arrays, means = self.arrays, self._means
        saves = min(means.window, means.read)
        if means.stall + means.used * saves < LEAST_STALL * means.layer:
            arrays.allowed[:] = False
            self.depth = 0
            return
        least = least_precision(means.window, means.read, self._in_vain)
        choose(arrays, least, self._budget)
        if int(arrays.named.sum()) > WINDOW:
            for counts in (arrays.named, arrays.wanted, arrays.misses):
                counts //= 2
        is_known = int(arrays.named.sum()) >= LEAST_COUNT * LEVELS
        if arrays.allowed.any() or not is_known or self._tokens % PROBE_TOKENS == 0:
            self.depth = self._most
        else:
            self.depth = 0


def least_precision(window_s: float, read_s: float, in_vain: float) -> float:
    """Return how often a guess must come true to be worth a read.

    One that does saves what of its read fits into the window. One that does not makes a demand read
    wait for the pieces under way, `in_vain` of a read: p * min(window, read) = (1 - p) * in_vain *
    read at the least p.
    """
    gain = min(1.0, window_s / read_s) if read_s > 0 else 1.0
    return in_vain / (in_vain + gain) if gain > 0 else 1.0


def choose(arrays: AheadArrays, least: float, budget: float) -> None:
    """Allow the surest levels whose reads in vain, charged twice, fit the budget.

    The surest one that pays is allowed even where it alone goes beyond: the credit then stops it
    from time to time.
    """
    named, wanted = arrays.named.ravel(), arrays.wanted.ravel()
    precision = wanted / np.maximum(named, 1)
    precision[named < LEAST_COUNT] = 0.0
    left = budget * float(arrays.misses[0])
    allowed = np.zeros(named.size, np.bool_)
    for cell in np.argsort(-precision, kind="stable").tolist():
        left -= 2.0 * float(named[cell] - wanted[cell])
        if precision[cell] < max(least, 1e-9) or (left < 0 and allowed.any()):
            break
        allowed[cell] = True
    arrays.allowed[:] = allowed.reshape(arrays.allowed.shape)
