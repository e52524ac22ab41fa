"""Counts what a request costs and what the engine has done since it started."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fomoe.engine.requests import Receipt
from fomoe.engine.waterfall import NOTHING, Seconds, Stopwatch, Waterfall, added, milliseconds


@dataclass(slots=True)
class HostCounters:
    """Running totals of an expert host; activations are (layer, token, expert) triples.

    `prompt_*` are the activations of prefill steps, the others those of decode steps. `guesses`
    are the prefetches of decode steps: asked for, wanted by the layer that they were for, and
    dropped before their read began; `prefetch_*` count those of prompts, too.
    """

    hits_device: int = 0
    hits_ram: int = 0
    reads_nvme: int = 0
    prompt_hits_device: int = 0
    prompt_hits_ram: int = 0
    prompt_reads_nvme: int = 0
    nvme_bytes: int = 0
    ram_bytes: int = 0
    demoted_bytes: int = 0
    substitutes_device: int = 0
    substitutes_ram: int = 0
    substitutes_nvme: int = 0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    guesses: int = 0
    guesses_used: int = 0
    guesses_dropped: int = 0
    stall_s: float = 0.0
    compute_s: float = 0.0

    def copy(self) -> HostCounters:
        """Return the present values."""
        return HostCounters(*(getattr(self, name) for name in self.__slots__))


@dataclass(slots=True)
class LossCounters:
    """Running totals of cache-aware routing."""

    substituted: int = 0
    lost_mass: float = 0.0


class Meter:
    """Takes differences of the running totals between the start and the end of a request.

    Attributes:
        token_parts: where the last token's time went, seconds by `waterfall.PARTS`.
    """

    def __init__(
        self,
        host: HostCounters,
        loss: LossCounters,
        watch: Stopwatch,
        *,
        devices: str,
        capacity: int,
    ) -> None:
        self.host = host
        self.loss = loss
        self.token_parts: Seconds = NOTHING
        self.prompt_parts: Seconds = NOTHING
        self.generated_parts: Seconds = NOTHING
        self._waterfall = Waterfall(watch, time.monotonic)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.prompt_s = self.generated_s = 0.0
        self._devices = devices
        self._capacity = capacity
        self.start(car=0.0, cached=0)

    def start(self, *, car: float, cached: int) -> None:
        """Begin a request with cache-aware threshold `car` and `cached` tokens taken over."""
        self._host0 = self.host.copy()
        self._loss0 = LossCounters(self.loss.substituted, self.loss.lost_mass)
        self._car, self._cached = car, cached
        self._prompt = self._generated = 0
        self._t0 = self._t1 = self._last = time.monotonic()
        self._parts()
        self._prompt_parts = self._generated_parts = NOTHING

    def _parts(self) -> Seconds:
        return self._waterfall.read(self.host.compute_s, self.host.stall_s)

    def prompt_done(self, tokens: int) -> None:
        """The prompt of `tokens` has gone through the layers; decoding starts."""
        self._prompt = tokens
        self.prompt_tokens += tokens - self._cached
        self.cached_tokens += self._cached
        self._t1 = self._last = time.monotonic()
        self.prompt_s += self._t1 - self._t0
        self._prompt_parts = self._parts()
        self.prompt_parts = added(self.prompt_parts, self._prompt_parts)

    def token(self) -> None:
        """A token was generated."""
        self._generated += 1
        self.generated_tokens += 1
        now = time.monotonic()
        self.generated_s += now - self._last
        self._last = now
        self.token_parts = self._parts()
        self._generated_parts = added(self._generated_parts, self.token_parts)
        self.generated_parts = added(self.generated_parts, self.token_parts)

    def rate(self) -> float:
        """Return generated tokens per second of the request under way or the last one."""
        seconds = self._last - self._t1
        return (self._generated - 1) / seconds if self._generated > 1 and seconds > 0 else 0.0

    def receipt(self, decision_hash: int) -> Receipt:
        """Return what the request cost so far."""
        now, a, b = time.monotonic(), self._host0, self.host
        start = self._t1 if self._prompt else now
        return Receipt(
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            prompt_ms=(start - self._t0) * 1e3,
            generated_tokens=self._generated,
            generated_ms=(now - start) * 1e3,
            hits_device=b.hits_device - a.hits_device,
            hits_ram=b.hits_ram - a.hits_ram,
            reads_nvme=b.reads_nvme - a.reads_nvme,
            substituted=self.loss.substituted - self._loss0.substituted,
            prompt_hits_device=b.prompt_hits_device - a.prompt_hits_device,
            prompt_hits_ram=b.prompt_hits_ram - a.prompt_hits_ram,
            prompt_reads_nvme=b.prompt_reads_nvme - a.prompt_reads_nvme,
            nvme_bytes=b.nvme_bytes - a.nvme_bytes,
            ram_bytes=b.ram_bytes - a.ram_bytes,
            demoted_bytes=b.demoted_bytes - a.demoted_bytes,
            prefetched=b.guesses - a.guesses,
            prefetched_used=b.guesses_used - a.guesses_used,
            prefetched_dropped=b.guesses_dropped - a.guesses_dropped,
            stall_ms=(b.stall_s - a.stall_s) * 1e3,
            lost_mass=self.loss.lost_mass - self._loss0.lost_mass,
            mode=f"car {self._car:.2f}" if self._car > 0.0 else "exact",
            devices=self._devices,
            prompt_parts_ms=milliseconds(self._prompt_parts),
            generated_parts_ms=milliseconds(self._generated_parts),
            logical_capacity=self._capacity if self._car > 0.0 else 0,
            decision_hash=f"{decision_hash:016x}",
        )
