"""A layer step's decisions in one call: experts and weights, what is read, what the device gets.

A step runs in waves, because a pool may hold fewer experts than a long prompt wants: each wave
brings as many as fit, and the device computes them before the next takes their slots. A token has
one wave. Decode spends one native call per layer here, `decide`, and one in `look_ahead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.engine import _engine
from fomoe.engine._engine import StepArrays
from fomoe.engine.ahead import AheadArrays
from fomoe.engine.copies import COPY
from fomoe.engine.decisions import Decider
from fomoe.engine.gpu_segment import GpuSegment
from fomoe.engine.meter import HostCounters
from fomoe.engine.transfers import READ, SegmentSlots
from fomoe.residency import LogicalCache, Residency
from fomoe.routing import Route
from fomoe.routing.router import refuse_broken
from fomoe.types import ExpertKey, Tier

__all__ = [
    "BACKGROUND",
    "GUESSED",
    "STAYED",
    "Priorities",
    "StepArrays",
    "WaveArrays",
    "WaveLayout",
    "WavePlanner",
]

_COUNTS = 15
GUESSED = 10  # where the prefetches used stand that a look-ahead asked for
BACKGROUND = 11  # where the background reads stand
STAYED = 13  # where the experts to be computed in RAM stand


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WaveLayout:
    """Where layers live: node and device of each (int32 [L]), and an expert's bytes (int64 [L])."""

    layer_node: npt.NDArray[np.int32]
    layer_device: npt.NDArray[np.int32]
    expert_bytes: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Priorities:
    """What the `priority` of demand reads, of prefetches and of background reads is."""

    demand: int
    prefetch: int
    background: int


class WaveArrays:
    """The arrays that a wave planner shares with its native part; none is ever replaced.

    Attributes:
        layer_node: int32 [L].
        layer_device: int32 [L].
        expert_bytes: int64 [L].
        unproven: int8 [L, E], the `Tier` that a prefetched expert came from until it is wanted;
            Tier.DEVICE for all others.
        background: bool [L, E], whether what was last read ahead was so in the background: it had
            been wanted and did not run. Its next use counts as a hit.
        ids: int32 [T, k], the route, best rank first.
        weights: float32 [T, k], its weights.
        experts: int32 [E], a step's experts in the order they are served.
        pairs: int64 [E], pairs of each of them, substitutes left out.
        reads: records of `READ` [2 E], what the last call asks storage for.
        copies: records of `COPY` [4 E], what the last call asks the GPU for.
        arm: int32 [k + 1], how many of so many experts of a token in RAM are computed there. Where
            any are, nothing is brought ahead on GPUs.
        counts: int64 [16] of the last call: activations whose bytes came from device, RAM, NVMe;
            substitutes alike; prefetches used; issued; bytes read; promoted (to a GPU: all bytes
            that cross its link); demoted; prefetches used that a look-ahead of this planner asked
            for; background reads and their bytes; experts to be computed in
            RAM; reads that a look-ahead asked for.
    """

    def __init__(self, layout: WaveLayout, n_experts: int, max_tokens: int, top_k: int) -> None:
        self.layer_node = np.ascontiguousarray(layout.layer_node, dtype=np.int32)
        self.layer_device = np.ascontiguousarray(layout.layer_device, dtype=np.int32)
        self.expert_bytes = np.ascontiguousarray(layout.expert_bytes, dtype=np.int64)
        self.unproven = np.full((len(self.layer_node), n_experts), Tier.DEVICE, np.int8)
        self.background = np.zeros(self.unproven.shape, np.bool_)
        self.ids = np.zeros((max_tokens, top_k), np.int32)
        self.weights = np.zeros((max_tokens, top_k), np.float32)
        self.experts = np.zeros(n_experts, np.int32)
        self.pairs = np.zeros(n_experts, np.int64)
        self.reads = np.zeros(2 * n_experts, READ)
        self.copies = np.zeros(4 * n_experts, COPY)
        self.arm = np.zeros(top_k + 1, np.int32)
        self.counts = np.zeros(_COUNTS, np.int64)


class WavePlanner:
    """Plans layer steps on a residency and the segments of its nodes; waits for nothing.

    The results of a call stand in `arrays` until the next call. Prefetched experts are asked for
    again, as demand, when they are wanted: storage may have dropped a prefetch that never got its
    turn.

    On nodes of GPUs a call also leaves copies, see `fomoe.engine.copies`: `step_copies` go with the
    step, `ahead_copies` do not. There the answer to every wave is passed on by `answered` before
    the device's next one is planned, and answers to ahead lists by `ended`.
    """

    def __init__(
        self, residency: Residency, segments: Sequence[SegmentSlots], layout: WaveLayout,
        priorities: Priorities, ahead: AheadArrays, *, max_tokens: int, top_k: int,
    ) -> None:  # fmt: skip
        n_experts = segments[0].slot_of.shape[1]
        self.arrays = WaveArrays(layout, n_experts, max_tokens, top_k)
        self._residency = residency
        self._segments = list(segments)
        self._cancelled: dict[int, list[npt.NDArray[np.void]]] = {}  # by device
        self._native = _engine.WavePlanner(
            residency.native, self._segments, self.arrays, ahead, priorities
        )

    def decide(
        self, layer: int, scores: npt.NDArray[np.float32], logical: LogicalCache, out: StepArrays
    ) -> int:
        """Route one sequence's tokens exactly, tell its logical cache, start the step.

        Args:
            layer: index of the layer.
            scores: float32 [T, E], router scores.
            logical: the sequence's; it only observes.
            out: where the step is written.

        Returns:
            The number of reads that storage must be asked for; 0 if all experts are at hand.

        Raises:
            EngineError: a row of scores is not finite.
        """
        n = self._native.decide(layer, scores, logical.tokens, logical.hash_word, out)
        if n < 0:
            refuse_broken(-1 - n, len(scores))
        return n

    def decide_by(
        self, layer: int, scores: npt.NDArray[np.float32], decider: Decider,
        prices: npt.NDArray[np.float32] | None, out: StepArrays,
    ) -> int:  # fmt: skip
        """Let a rule choose for one sequence's token, start the step, ask for what it left out.

        Args:
            layer: index of the layer.
            scores: float32 [1, E], router scores.
            decider: of one sequence, whose logical cache it advances; `decider.out` has the rest.
            prices: float32 [1], in place of the rule's own price.
            out: where the step is written.

        Returns:
            The number of reads, those in the background last; `arrays.counts` says how many.

        Raises:
            EngineError: the scores are not finite; nothing is decided then.
        """
        n = self._native.decide_by(layer, scores, decider.native, prices, out)
        if n < 0:
            refuse_broken(0, 1)
        return n

    def read_later(self, layer: int, experts: npt.NDArray[np.int32]) -> int:
        """Ask for experts that were wanted and did not run; returns the number of reads.

        Nothing waits for them; the layer's next steps ask for them again, as demand, when they are
        wanted.
        """
        return self._native.read_later(layer, experts)

    def place(self, layer: int, route: Route, out: StepArrays) -> int:
        """Start the step of a route that was made elsewhere; returns the number of reads."""
        return self._native.place(layer, route.ids, route.weights, route.substituted, out)

    def picks(self, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> None:
        """Write a token's experts int32 [k], ascending, and their weights float32 [k]."""
        self._native.picks(ids, weights)

    def wave(self) -> int:
        """Plan the next wave, once the last one is computed and released; returns its reads."""
        return self._native.wave()

    @property
    def step_copies(self) -> npt.NDArray[np.void]:
        """Return the copies that the last call wants with the step, records of `COPY`."""
        return self.arrays.copies[: self._native.step_copies]

    @property
    def ahead_copies(self) -> npt.NDArray[np.void]:
        """Return the copies that the last call wants beside the step, records of `COPY`."""
        first = self._native.step_copies
        return self.arrays.copies[first : first + self._native.ahead_copies]

    def answered(self, device: int, *, aborted: bool) -> None:
        """A device has answered for its last wave; or it was never sent, which is an abort.

        To be called before the residency releases the layer, and before the device's next wave.
        After an abort the experts whose loads the wave waited for are nowhere any more.
        """
        self._native.answered(device, aborted)

    def is_tight(self, layer: int) -> bool:
        """Whether a step of the layer must wait for the answers of steps under way elsewhere.

        They hold slots of the segment that it may need. Never so without such steps.
        """
        return self._native.is_tight(layer)

    def ended(self, copies: npt.NDArray[np.void]) -> None:
        """A device has answered for records of ahead lists, by `outcome`."""
        self._native.ended(copies)

    @property
    def has_cancelled(self) -> bool:
        """Whether a device must be sent CANCEL records."""
        return bool(self._cancelled)

    def take_cancelled(self, device: int) -> npt.NDArray[np.void]:
        """Return the CANCEL records that the device must be sent, each once."""
        return np.concatenate([np.empty(0, COPY), *self._cancelled.pop(device, [])])

    def give_up_guesses(self) -> None:
        """Take back what was guessed for the last step, not wanted, and is not known to have come.

        `ahead_copies` are its CANCELs. Experts that RAM does not have as well are left to come.
        """
        self._native.give_up_guesses()

    def look_ahead(self, layer: int, scores: npt.NDArray[np.float32], depth: int = 1) -> int:
        """Prefetch what the layer, `depth` further on, will want for sure enough.

        Returns the number of reads; `AheadArrays` says which guesses are worth one.

        Scores that are not finite give none: between the start and the end of a step nothing may
        fail, least of all a guess.
        """
        return self._native.look_ahead(layer, scores, depth)

    @property
    def first(self) -> int:
        """Return where the last wave begins in the step's experts and entries."""
        return self._native.first

    @property
    def end(self) -> int:
        """Return where the last wave ends."""
        return self._native.end

    @property
    def n_experts(self) -> int:
        """Return how many experts the step has."""
        return self._native.n_experts

    def charge(self, totals: HostCounters, *, decoding: bool) -> None:
        """Add what the last call cost to the totals."""
        device, ram, nvme, on_device, in_ram, in_file, *rest = self.arrays.counts.tolist()
        issued, read, promoted, demoted, guessed, _, later, stayed, guesses = rest
        if decoding:
            totals.hits_device += device
            totals.hits_ram += ram
            totals.reads_nvme += nvme
            totals.substitutes_device += on_device
            totals.substitutes_ram += in_ram
            totals.substitutes_nvme += in_file
            totals.prefetched += guesses
            totals.prefetched_used += guessed
            totals.computed_in_ram += stayed
        else:
            totals.prompt_hits_device += device
            totals.prompt_hits_ram += ram
            totals.prompt_reads_nvme += nvme
        totals.background_bytes += later
        totals.prefetch_issued += issued
        totals.nvme_bytes += read
        totals.ram_bytes += promoted
        totals.demoted_bytes += demoted

    def forget(self, key: ExpertKey) -> None:
        """Drop an expert whose read failed from both tiers and from its segment."""
        self._residency.forget(key.layer, np.array([key.expert], np.int32))
        segment = self._segments[self.arrays.layer_node[key.layer]]
        if isinstance(segment, GpuSegment):
            device = int(self.arrays.layer_device[key.layer])
            self._cancelled.setdefault(device, []).append(segment.drop(key))
        else:
            segment.forget(key)
        self.arrays.unproven[key.layer, key.expert] = Tier.DEVICE
