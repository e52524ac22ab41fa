"""Decisions of layers that GPUs host: what a token runs, what moves between the tiers for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.engine.ahead import AheadArrays
from fomoe.engine.decisions import Decider
from fomoe.engine.gpu_segment import GpuSegment
from fomoe.engine.meter import HostCounters
from fomoe.engine.plan import EnginePlan
from fomoe.engine.transfers import ENTRY
from fomoe.engine.waves import STAYED, Priorities, StepArrays, WaveLayout, WavePlanner
from fomoe.model.buffers import F32
from fomoe.residency import LogicalCache, Residency
from fomoe.routing import Route

I32 = npt.NDArray[np.int32]
Picks = tuple[I32, F32]  # ids int32 [k], ascending, and weights float32 [k] of one token


class Placed:
    """The accounts of all nodes' segments and all devices' slots, and steps planned on them.

    A token's step is `decide`, `decide_by` or `place`; then, while `is_last` is false, `more` once
    the device has answered for what came before; then `picks`, and `charge` once the device has its
    step. Each of the former returns how many reads storage must be asked for; they and the copies
    stand until the next call.

    Attributes:
        counters: running totals.
        expert_bytes: int64 [L].
        on_devices: whether every expert has a slot on its device, so that nothing ever moves.
        segments: of each node.
        planner: decides.
    """

    def __init__(
        self, plan: EnginePlan, residency: Residency, top_k: int, priorities: Priorities,
        ahead: AheadArrays,
    ) -> None:  # fmt: skip
        topology = plan.topology
        self.topology = topology
        self.residency = residency
        self.counters = HostCounters()
        self.on_devices = plan.on_devices
        layout = WaveLayout(
            layer_node=np.array([topology.device_node[d] for d in topology.layer_device], np.int32),
            layer_device=topology.layer_device,
            expert_bytes=np.array(
                [plan.table.expert_bytes(i) for i in range(topology.n_layers)], np.int64
            ),
        )
        self.expert_bytes = layout.expert_bytes
        self.segments: list[GpuSegment] = [
            plan.gpu_segment(node) for node in range(max(topology.device_node) + 1)
        ]
        self.planner = WavePlanner(
            residency, self.segments, layout, priorities, ahead, max_tokens=1, top_k=top_k
        )
        self._home: list[GpuSegment] = [self.segments[node] for node in layout.layer_node.tolist()]
        self._order = np.zeros((1, top_k), np.int32)
        self._weights = np.zeros((1, top_k), np.float32)
        self._entries = np.zeros(top_k, ENTRY)
        self._arrays = StepArrays(
            self._order, self._weights, np.zeros(top_k, np.int32), np.zeros(top_k + 1, np.int32),
            self._entries,
        )  # fmt: skip

    def segment_of(self, layer: int) -> GpuSegment:
        """Return the segment that the layer's experts pass through."""
        return self._home[layer]

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""
        self.residency.follow(None if logical is None else logical.caches.resident[0])

    def decide(self, layer: int, scores: F32, logical: LogicalCache) -> int:
        """Route one sequence's token exactly and tell its logical cache."""
        return self.planner.decide(layer, scores, logical, self._arrays)

    def decide_by(self, layer: int, scores: F32, decider: Decider, prices: F32 | None) -> int:
        """Let a rule choose for one sequence's token; `decider.out` has the rest."""
        return self.planner.decide_by(layer, scores, decider, prices, self._arrays)

    def place(self, layer: int, route: Route) -> int:
        """Take a token's route that was made elsewhere."""
        return self.planner.place(layer, route, self._arrays)

    def charge(self, *, decoding: bool) -> None:
        """Count what the last of these calls cost; a device waits for what comes before."""
        self.planner.charge(self.counters, decoding=decoding)

    @property
    def is_last(self) -> bool:
        """Whether what the last call brings completes the step."""
        return self.planner.end == self.planner.n_experts

    def more(self, *, decoding: bool) -> int:
        """Count the last part; bring the next of a step whose experts do not all fit."""
        self.charge(decoding=decoding)
        return self.planner.wave()

    def picks(self, out: Picks) -> None:
        """Write the step's experts and weights, in ascending id."""
        self.planner.picks(*out)

    @property
    def n_stay(self) -> int:
        """How many of the step's experts are computed in RAM; asked before `more`."""
        return int(self.planner.arrays.counts[STAYED])

    def stay(self) -> tuple[F32, npt.NDArray[np.void]]:
        """Return weights float32 [n] and entries [n] of those, ascending, by segment slots."""
        order = self._order[0]
        entries = self._entries[order]
        stays = entries["slot"] < 0
        entries = entries[stays]
        np.invert(entries["slot"], out=entries["slot"])
        return self._weights[0, stays], entries

    def part_picks(self, out: Picks) -> None:
        """As `picks` for the experts that are not computed in RAM; -1 stands behind the last."""
        ids, weights = out
        entries = self._entries[self._order[0]]
        moves = entries["slot"] >= 0
        count = int(np.count_nonzero(moves))
        ids[count:], weights[count:] = -1, 0.0
        ids[:count], weights[:count] = entries["expert"][moves], self._weights[0, moves]

    def answered(self, device: int, layer: int, *, aborted: bool) -> None:
        """The device has answered for a part of the layer's step, or given the step up."""
        self.planner.answered(device, aborted=aborted)
        if aborted:
            self.residency.release(layer)

    def close(self, device: int, layer: int) -> None:
        """The device has done the layer's step; its slots may be given to others."""
        self.planner.answered(device, aborted=False)
        self.residency.release(layer)

    def count_hits(self, activations: int, *, decoding: bool) -> None:
        """Count (layer, token, expert) triples that devices chose or prompts wanted."""
        if decoding:
            self.counters.hits_device += activations
        else:
            self.counters.prompt_hits_device += activations
