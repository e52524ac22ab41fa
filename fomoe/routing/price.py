"""The price of a read, steered token by token: by a byte budget, or by a measured loss.

Pure controllers. Their state is one integer, the price's binary logarithm in units of 2^-32, moved
by whole counts (bytes, nanonats) with integer division; the price itself takes only float64
additions and multiplications, which IEEE 754 rounds in one way. Equal counts give equal prices on
any machine, however the tokens come in calls. Both begin at a safe price, one that is low: most
missing experts are read.

The byte controller is the online price of dual descent, price *= exp(eta (spent - budget)/budget);
as logarithms add up, its mean spending over T tokens is off the budget by no more than
budget / (eta T) x the logarithm's whole range, unless the price stands at its upper end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe.errors import ConfigError

OCTAVE = 1 << 32
LEAST = -20 * OCTAVE  # 1e-6 of a token's mass: only experts as good as tied are replaced
MOST = 0  # nothing but the protected ranks is ever worth a read

NANO = 10**9
_LN2 = 0.6931471805599453
_TERMS = tuple(1.0 / math.factorial(n) for n in range(18, -1, -1))


def price_of(log2: int) -> float:
    """Return 2^(log2 / 2^32) as a float64; an error of about 1 ulp, the same on any machine."""
    x = (log2 % OCTAVE) / OCTAVE * _LN2
    power = 0.0
    for term in _TERMS:
        power = power * x + term
    return math.ldexp(power, log2 // OCTAVE)


def _moved(log2: int, step: int) -> int:
    return min(max(log2 + step, LEAST), MOST)


@dataclass(frozen=True, slots=True)
class BudgetPrice:
    """Holds the mean of what tokens spend at a budget.

    Attributes:
        budget: bytes per token, at least 1.
        log2: the price's binary logarithm in units of 2^-32.
    """

    budget: int
    log2: int = -6 * OCTAVE

    # A token that spends nothing halves the price in eight; one of twice the budget undoes it.
    STEPS_PER_OCTAVE = 8

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ConfigError(f"a budget of {self.budget} bytes per token: give at least 1")

    @property
    def price(self) -> float:
        """The price of a read of the next token, as a share of its router mass."""
        return price_of(self.log2)

    def after(self, spent: int) -> BudgetPrice:
        """Return the controller after a token that spent so many bytes, of whatever cause."""
        step = (spent - self.budget) * OCTAVE // (self.budget * self.STEPS_PER_OCTAVE)
        return BudgetPrice(self.budget, _moved(self.log2, step))


@dataclass(frozen=True, slots=True)
class LossPrice:
    """Holds the mean of a sampled loss just below a target.

    Each sample moves the price's logarithm by (aim - loss) / target of a gain that falls from
    `FIRST_GAIN` to `LAST_GAIN`: large steps find the model's scale, small ones hold it. The aim is
    7/8 of the target, because a price that wanders costs more above its mean than it saves below.
    A sample counts as `MOST_TARGETS` targets at most: losses are heavy-tailed, and one word must
    not stop substitution for a thousand tokens.

    Attributes:
        target: nanonats per token, at least 1.
        samples: samples seen.
        log2: the price's binary logarithm in units of 2^-32.
    """

    target: int
    samples: int
    log2: int

    FIRST_GAIN = OCTAVE
    LAST_GAIN = OCTAVE // 16
    HALVED_AFTER = 4
    MOST_TARGETS = 32

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ConfigError(f"a target of {self.target} nanonats per token: give at least 1")

    @classmethod
    def towards(cls, target: float) -> LossPrice:
        """Return a controller at its safe start for a target in nats per token.

        The loss grows about as the price's square, so the start is a fraction of the target's
        root, to the next half of an octave.
        """
        nano = max(1, round(target * NANO))
        octaves = nano.bit_length() - NANO.bit_length()
        return cls(nano, 0, _moved(octaves * OCTAVE // 2, -5 * OCTAVE))

    @property
    def price(self) -> float:
        """The price of a read of the next token, as a share of its router mass."""
        return price_of(self.log2)

    def after(self, loss: int) -> LossPrice:
        """Return the controller after a sampled loss in nanonats (negative ones count as 0)."""
        seen = min(max(loss, 0), self.MOST_TARGETS * self.target)
        gain = self.FIRST_GAIN * self.HALVED_AFTER // (self.HALVED_AFTER + self.samples)
        gain = max(gain, self.LAST_GAIN)
        step = (7 * self.target - 8 * seen) * gain // (8 * self.target)
        return LossPrice(self.target, self.samples + 1, _moved(self.log2, step))


def is_sampled(step: int, every: int) -> bool:
    """Whether a loss is measured at a decode step: one in each `every` steps, 0 for none.

    Which one is a hash of the block's number (Steele, Lea, Flood: SplitMix64), so that no period
    of a text falls in with it.
    """
    if every <= 0:
        return False
    block, offset = divmod(step, every)
    return offset == _mixed(block) % every


def _mixed(word: int) -> int:
    mask = (1 << 64) - 1
    word = (word + 0x9E3779B97F4A7C15) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)
