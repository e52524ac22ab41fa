"""What a client asks of an engine and what comes back; plain data, no transport."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn; temperature 0 is greedy (ties: the lower token id).

    The draw for position p of a request depends on (seed, p) and the logits alone, so a stream
    can be continued elsewhere with the same tokens. Order: penalties and bias, temperature, top_k,
    top_p, min_p, draw.
    """

    temperature: float = 0.7
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate.

    `stop_ids` end the sequence (the stop token is reported in `Finished.stop_id`, never emitted
    as a token); stop *strings* are the server's business, which cancels. `logprobs` is the number
    of alternatives per emitted token (-1: none at all, 0: only the token's own). `echo` asks for
    `PromptLogprobs` of the prompt's own tokens before the first token. `quality` is a
    contract's text in place of the engine's default (see `fomoe.quality`).
    `waterfall` asks for each token's `parts_s`. `domain` says what kind of text it is, for traces.
    `forced` are emitted and fed in place of the first sampled tokens: a benchmark's text.
    `logits` asks for each token's whole row of logits; `null_share` rounds that share of decode
    steps' routing weights to bfloat16 (the null of evaluations, see `fomoe.routing.nulls`).
    """

    request_id: str
    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    logprobs: int = -1
    echo: bool = False
    quality: str | None = None
    waterfall: bool = False
    domain: str = ""
    forced: list[int] = field(default_factory=list)
    logits: bool = False
    null_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProgress:
    """Prompt tokens processed so far (`cached` of them came from an earlier request)."""

    request_id: str
    total: int
    processed: int
    cached: int
    time_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log probability of each prompt token given those before it (first one: None)."""

    request_id: str
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token.

    `top` holds (token id, log probability), best first; `parts_s` where the token's time went, by
    `waterfall.PARTS`, and `logits` the row that the token was chosen from, float32 [V]
    little-endian before penalties, where the request asked for them.
    """

    request_id: str
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    parts_s: list[float] = field(default_factory=list)
    logits: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What an answer cost: tokens, seconds, expert activations and bytes by tier.

    `hits_device`, `hits_ram` and `reads_nvme` count expert activations of decode steps (one per
    layer, token and chosen expert); `substituted` counts those replaced under a contract, which are
    in none of the three. The prompt's activations are counted apart in `prompt_*`.
    `nvme_bytes` is all that was read, of which `prompt_bytes` by prompts, `prefetch_bytes` ahead of
    the router, `background_bytes` for experts that were wanted earlier, `shadow_bytes` by shadow
    steps; the rest on demand. `logical_bytes` is what the contract's budget counts: expert bytes
    that generated tokens asked for and that were not logically resident, shadow steps included.
    `shadow_kl` is the sum over `shadow_steps` of the estimated KL(exact, answer), in nats.
    `prefetched` experts were asked for before a decode step's router spoke, `_used` of them were
    wanted, `_dropped` never read: used / (prefetched - dropped) is their precision, used /
    reads_nvme their recall on misses.
    `cpu_arm` says how many of 0, 1, 2 .. experts of a token in RAM the processor computes there
    instead of the GPU (`fomoe.engine.arm`); `computed_in_ram` counts them.
    `prompt_parts_ms` and `generated_parts_ms` say where the time went, by `waterfall.PARTS`.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_ms: float = 0.0
    generated_tokens: int = 0
    generated_ms: float = 0.0
    hits_device: int = 0
    hits_ram: int = 0
    reads_nvme: int = 0
    substituted: int = 0
    prompt_hits_device: int = 0
    prompt_hits_ram: int = 0
    prompt_reads_nvme: int = 0
    nvme_bytes: int = 0
    ram_bytes: int = 0
    demoted_bytes: int = 0
    computed_in_ram: int = 0
    prompt_bytes: int = 0
    prefetch_bytes: int = 0
    background_bytes: int = 0
    shadow_bytes: int = 0
    logical_bytes: int = 0
    shadow_steps: int = 0
    shadow_kl: float = 0.0
    price: float = 0.0  # of a read in the last step
    prefetched: int = 0
    prefetched_used: int = 0
    prefetched_dropped: int = 0
    stall_ms: float = 0.0
    lost_mass: float = 0.0
    prompt_parts_ms: dict[str, float] = field(default_factory=dict)
    generated_parts_ms: dict[str, float] = field(default_factory=dict)
    mode: str = "exact"
    cpu_arm: str = "off"
    devices: str = "device"  # "vram", or "device (emulated)" where a CPU stands in for a GPU
    logical_capacity: int = 0  # experts per layer, lossy modes only
    decision_hash: str = ""

    @property
    def outcomes(self) -> dict[str, int]:
        """What became of the activations of generated tokens."""
        return {
            "device": self.hits_device,
            "ram": self.hits_ram,
            "nvme": self.reads_nvme,
            "substituted": self.substituted,
        }

    @property
    def bytes_by_cause(self) -> dict[str, int]:
        """What was read from the files, by why; the values add up to `nvme_bytes`."""
        return causes(
            self.nvme_bytes,
            prompt=self.prompt_bytes,
            prefetch=self.prefetch_bytes,
            background=self.background_bytes,
            shadow=self.shadow_bytes,
        )

    @property
    def estimated_kl(self) -> float | None:
        """Mean KL(exact, answer) in nats per token, by the shadow steps; None without any."""
        return self.shadow_kl / self.shadow_steps if self.shadow_steps else None


def shares(outcomes: Mapping[str, int]) -> dict[str, float]:
    """Return counts as shares of their sum, all 0 where that is 0."""
    total = max(1, sum(outcomes.values()))
    return {outcome: count / total for outcome, count in outcomes.items()}


def causes(total: int, **known: int) -> dict[str, int]:
    """Return bytes read by cause; what is no other's was read on demand."""
    return {"demand": total - sum(known.values())} | known


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of a request, exactly one of which is sent."""

    request_id: str
    reason: FinishReason
    stop_id: int | None = None
    error: str | None = None
    receipt: Receipt = field(default_factory=Receipt)


Event = PromptProgress | PromptLogprobs | TokenEvent | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What `/health`, `/ready`, `/metrics` and the status line show."""

    state: Literal["loading", "ready", "degraded", "stopped"]
    load_progress: float = 1.0  # 0 to 1
    running: int = 0
    queued: int = 0
    detail: str = ""
    counters: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """What the server and the command line see of a running engine."""

    @property
    def ctx_size(self) -> int:
        """Tokens that one sequence may hold (prompt and answer together)."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Yield the request's events; closing the iterator early cancels the request."""

    def status(self) -> EngineStatus:
        """Return the present state without blocking."""
