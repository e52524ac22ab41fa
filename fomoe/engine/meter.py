"""Counts what a request costs and what the engine has done since it started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from fomoe.engine.requests import Receipt, shares
from fomoe.engine.waterfall import NOTHING, Seconds, Stopwatch, Waterfall, added, milliseconds
from fomoe.quality import Quality
from fomoe.routing.price import NANO


@dataclass(slots=True)
class HostCounters:
    """Running totals of an expert host; activations are (layer, token, expert) triples.

    `prompt_*` are the activations of prefill steps, the others those of decode steps. Of
    `nvme_bytes`, all that was read, `prompt_bytes` were read by prompts, `prefetch_bytes` ahead of
    the router, `background_bytes` for what was wanted earlier and `shadow_bytes` by shadow steps.
    `prefetched` are the prefetches of decode steps: asked for, `_used` by the step that they were
    for, `_dropped` before their read began; `prefetch_issued` counts those of prompts, too.
    `computed_in_ram` are experts of decode steps that the processor computed beside a GPU.
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
    computed_in_ram: int = 0
    substitutes_device: int = 0
    substitutes_ram: int = 0
    substitutes_nvme: int = 0
    prompt_bytes: int = 0
    prefetch_bytes: int = 0
    background_bytes: int = 0
    shadow_bytes: int = 0
    prefetch_issued: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    prefetched_dropped: int = 0
    stall_s: float = 0.0
    compute_s: float = 0.0

    def copy(self) -> HostCounters:
        """Return the present values."""
        return replace(self)


@dataclass(slots=True)
class LossCounters:
    """Running totals of lossy routing; see `Receipt` for what each counts."""

    substituted: int = 0
    lost_mass: float = 0.0
    logical_bytes: int = 0
    shadow_steps: int = 0
    shadow_nanonats: int = 0

    def copy(self) -> LossCounters:
        """Return the present values."""
        return replace(self)


class Meter:
    """Takes differences of the running totals between the start and the end of a request.

    Attributes:
        token_parts: where the last token's time went, seconds by `waterfall.PARTS`.
        price: of a read in the last decode step.
    """

    def __init__(
        self,
        host: HostCounters,
        loss: LossCounters,
        watch: Stopwatch,
        *,
        devices: str,
        capacity: int,
        cpu_arm: str = "off",
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
        self._cpu_arm = cpu_arm
        self._capacity = capacity
        self.start(Quality(), cached=0)

    def start(self, quality: Quality, *, cached: int) -> None:
        """Begin a request that is held to `quality` and takes over `cached` tokens."""
        self._host0 = self.host.copy()
        self._loss0 = self.loss.copy()
        self._quality, self._cached = quality, cached
        self.price = 0.0
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

    def stepped(self, price: float, spent: int) -> None:
        """A decode step of lossy routing asked for `spent` bytes that were not resident."""
        self.price = price
        self.loss.logical_bytes += spent

    @contextmanager
    def shadow(self) -> Iterator[None]:
        """Charge what is read inside to shadow steps; its activations are none of the answer's."""
        host, before = self.host, self.host.copy()
        try:
            yield
        finally:
            for name in _ACTIVATIONS:
                setattr(host, name, getattr(before, name))
            # A read ahead that storage gives up meanwhile is taken back from its own cause.
            own = (getattr(host, name) - getattr(before, name) for name in _OTHER_CAUSES)
            host.shadow_bytes += host.nvme_bytes - before.nvme_bytes - sum(own)

    def shadowed(self, loss: int) -> None:
        """A shadow step estimated a loss in nanonats."""
        self.loss.shadow_steps += 1
        self.loss.shadow_nanonats += loss

    def rate(self) -> float:
        """Return generated tokens per second of the request under way or the last one."""
        seconds = self._last - self._t1
        return (self._generated - 1) / seconds if self._generated > 1 and seconds > 0 else 0.0

    def estimated_kl(self) -> float:
        """Return nats per token that shadow steps measured in this request; 0 without any."""
        steps = self.loss.shadow_steps - self._loss0.shadow_steps
        return self._shadow_kl() / steps if steps else 0.0

    def _shadow_kl(self) -> float:
        return (self.loss.shadow_nanonats - self._loss0.shadow_nanonats) / NANO

    def shares(self) -> dict[str, float]:
        """Return the outcomes of this request's generated activations, as shares of 1."""
        host, before = self.host, self._host0
        counts = {
            "device": host.hits_device - before.hits_device,
            "ram": host.hits_ram - before.hits_ram,
            "nvme": host.reads_nvme - before.reads_nvme,
            "substituted": self.loss.substituted - self._loss0.substituted,
        }
        return shares(counts)

    def receipt(self, decision_hash: int) -> Receipt:
        """Return what the request cost so far."""
        now, a, b, loss = time.monotonic(), self._host0, self.host, self.loss
        start = self._t1 if self._prompt else now
        return Receipt(
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            prompt_ms=(start - self._t0) * 1e3,
            generated_tokens=self._generated,
            generated_ms=(now - start) * 1e3,
            stall_ms=(b.stall_s - a.stall_s) * 1e3,
            shadow_kl=self._shadow_kl(),
            price=self.price,
            mode=str(self._quality),
            devices=self._devices,
            cpu_arm=self._cpu_arm,
            prompt_parts_ms=milliseconds(self._prompt_parts),
            generated_parts_ms=milliseconds(self._generated_parts),
            logical_capacity=0 if self._quality.is_exact else self._capacity,
            decision_hash=f"{decision_hash:016x}",
            **{name: getattr(b, name) - getattr(a, name) for name in _HOST_COUNTS},
            **{name: getattr(loss, name) - getattr(self._loss0, name) for name in _LOSS_COUNTS},
        )


def _shared(counters: type) -> tuple[str, ...]:
    """Return the names that running totals and receipts have in common."""
    return tuple(part.name for part in fields(counters) if part.name in _RECEIPT)


_ACTIVATIONS = ("hits_device", "hits_ram", "reads_nvme", "prefetched_used", "computed_in_ram")
_OTHER_CAUSES = ("prompt_bytes", "prefetch_bytes", "background_bytes")
_RECEIPT = {part.name for part in fields(Receipt)}
_HOST_COUNTS, _LOSS_COUNTS = _shared(HostCounters), _shared(LossCounters)
