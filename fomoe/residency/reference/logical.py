"""Logical caches in plain Python: the definition of their bits, and their oracle in tests."""

from __future__ import annotations

import struct

from fomoe.residency.logical import LogicalRules

_MASK = (1 << 64) - 1
_ONE = 1 << 36
_AGES = 4096


def scramble(x: int) -> int:
    """Return splitmix64 of x."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


class ReferenceLogical:
    """One layer of one sequence; methods and words as in the native one."""

    def __init__(self, layer: int, rules: LogicalRules) -> None:
        self.layer = layer
        self.rules = rules
        self.resident: set[int] = set()
        self.weight: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.tokens = self.decoded = self.hash = 0
        self.credit = layer * rules.backfill.numerator % rules.backfill.denominator
        self.flight: list[tuple[int, int]] = []  # (expert, token that may use it), oldest first

    def weigh(self, probabilities: dict[int, float]) -> None:
        """Move the averages towards the probabilities (float32 values); absent ones are 0."""
        if self.rules.eviction != "mass":
            return
        for expert in self.weight.keys() | probabilities.keys():
            old = self.weight.get(expert, 0)
            part = int(probabilities.get(expert, 0.0) * (1 << 20))
            self.weight[expert] = old - (old >> self.rules.shift) + part

    def want(self, ids: list[int]) -> None:
        """Count a token's wish for its exact top-k."""
        if self.rules.eviction != "lfru":
            return
        for expert in ids:
            age = self.tokens - self.last.get(expert, -1)
            kept = self.weight.get(expert, 0) * self._power(age) >> 36
            self.weight[expert] = kept + (1 << 16)
            self.last[expert] = self.tokens

    def run(self, ids: list[int]) -> list[bool]:
        """Bring in what runs; returns which of it are demand reads."""
        if self.rules.eviction == "lru":
            self.last.update(dict.fromkeys((e for e in ids if e >= 0), self.tokens))
        flying = {expert for expert, _ in self.flight}
        coming = [e for e in ids if e >= 0 and e not in self.resident]
        self.flight = [f for f in self.flight if f[0] not in coming]
        self._admit(coming, {e for e in ids if e >= 0}, self.tokens)
        return [e in coming and e not in flying for e in ids]

    def fill(self, wanted: list[int], ids: list[int]) -> list[int]:
        """Ask for what was wanted and does not run; returns it."""
        n, per = self.rules.backfill.numerator, self.rules.backfill.denominator
        self.credit += n
        issued = []
        for expert in wanted:
            if self.credit < per or n == 0:
                break
            if expert not in ids and expert not in {e for e, _ in self.flight}:
                self.flight.append((expert, self.tokens + self.rules.delay))
                issued.append(expert)
                self.credit -= per
        self.credit = min(self.credit, per)
        return issued

    def close(self, ids: list[int], price: float | None = None) -> None:
        """Hash what ran; then the next token's background reads land."""
        base = self.tokens << 32 | self.layer << 16
        words = [scramble(base | e) for e in ids if e >= 0]
        if price is not None:
            bits = struct.unpack("<I", struct.pack("<f", price))[0]
            words.append(scramble(scramble(base | 0xFFFF) ^ bits))
        self.hash = (self.hash + sum(words)) & _MASK
        self.tokens += 1
        landing = [e for e, due in self.flight if due <= self.tokens]
        self.flight = [f for f in self.flight if f[1] > self.tokens]
        if self.rules.eviction == "lru":
            self.last.update(dict.fromkeys(landing, self.tokens))
        self._admit(landing, set(), self.tokens)

    def _admit(self, coming: list[int], kept: set[int], now: int) -> None:
        leaving = max(len(self.resident) + len(coming) - self.rules.capacity, 0)
        free = sorted(self.resident - kept, key=lambda e: (self._worth(e, now), e))
        self.resident -= set(free[:leaving])
        self.resident |= set(coming)

    def _worth(self, expert: int, now: int) -> int:
        if self.rules.eviction == "lru":
            return self.last.get(expert, -1)
        if self.rules.eviction == "mass":
            return self.weight.get(expert, 0)
        age = min(now - self.last.get(expert, -1), _AGES - 1)
        return self.weight.get(expert, 0) * (self._power(age) // (age + 1))

    def _power(self, age: int) -> int:
        value = _ONE
        for _ in range(min(age, _AGES - 1)):
            value = value * self.rules.decay.numerator // self.rules.decay.denominator
        return value
