"""The engine's own loop over resident experts: the reference that tiers and actors must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fomoe.config import RoutingConfig
from fomoe.engine.experts import ResidentExperts
from fomoe.engine.forward import Forward
from fomoe.engine.generation import Generation
from fomoe.engine.meter import HostCounters, Meter
from fomoe.engine.requests import Event, Finished, GenerateRequest, SamplingParams, TokenEvent
from fomoe.engine.sequences import Sequence
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.layers import DenseModel
from fomoe.residency import LogicalRules

GREEDY = SamplingParams(temperature=0.0)


class LocalModel:
    """A model in this process, every expert in memory."""

    def __init__(self, path: Path, *, chunk: int = 16) -> None:
        file = open_gguf(path)
        self.path = path
        self.spec = read_spec(file)
        self.chunk = chunk
        self.routing = RoutingConfig(shadow_every=0)
        model = DenseModel(file, self.spec, chunk, int8=True)
        experts = ResidentExperts(file, self.spec, chunk, int8=True, threads=1)
        self.forward = Forward(model, experts, prefetch=False)

    def sequence(self, ctx: int = 128, capacity: int | None = None, **rules: Any) -> Sequence:
        given = LogicalRules(capacity=capacity or self.spec.moe.n_experts, **rules)
        return Sequence(self.spec, ctx, "f16", given)

    def generation(self, request: GenerateRequest, sequence: Sequence | None = None) -> Generation:
        sequence = sequence or self.sequence()
        meter = Meter(
            HostCounters(), self.forward.brain.loss, self.forward.watch, devices="none",
            capacity=sequence.logical.capacity,
        )  # fmt: skip
        return Generation(
            request, sequence, self.forward, meter, chunk=self.chunk, routing=self.routing
        )

    def run(self, request: GenerateRequest, sequence: Sequence | None = None) -> list[Event]:
        generation = self.generation(request, sequence)
        events: list[Event] = []
        while not generation.finished:
            events += generation.step()
        return events


def greedy(prompt: list[int], max_tokens: int, **fields: object) -> GenerateRequest:
    """Return a greedy request; `fields` replace any of its fields."""
    values = {"request_id": "r", "sampling": GREEDY, "max_tokens": max_tokens} | fields
    return GenerateRequest(prompt=prompt, **values)  # type: ignore[arg-type]


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, TokenEvent)]


def finished(events: list[Event]) -> Finished:
    """Return the last event; there must be exactly one `Finished`, and nothing behind it."""
    ends = [event for event in events if isinstance(event, Finished)]
    assert len(ends) == 1, ends
    assert events[-1] is ends[0]
    return ends[0]


def told(events: list[Event]) -> tuple[object, ...]:
    """What a machine may not change: tokens with log probabilities, decisions, price and loss."""
    tokens = [(e.token, e.logprob, e.top) for e in events if isinstance(e, TokenEvent)]
    receipt = finished(events).receipt
    counts = receipt.substituted, receipt.lost_mass, receipt.price, receipt.shadow_kl
    return tokens, receipt.decision_hash, *counts
