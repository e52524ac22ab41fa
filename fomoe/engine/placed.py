"""Decisions where every expert has a place on its device: counted like any, and nothing moves."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fomoe.engine.ahead import AheadArrays
from fomoe.engine.decisions import Decider
from fomoe.engine.meter import HostCounters
from fomoe.engine.plan import EnginePlan
from fomoe.engine.transfers import ENTRY
from fomoe.engine.waves import Priorities, StepArrays, WaveLayout, WavePlanner
from fomoe.errors import EngineError
from fomoe.model.buffers import F32
from fomoe.residency import LogicalCache, Placement, Residency
from fomoe.routing import Route

I32 = npt.NDArray[np.int32]
Picks = tuple[I32, F32]  # ids int32 [k], ascending, and weights float32 [k] of one token


class Placed:
    """What a decode step runs on devices that hold all experts.

    Attributes:
        counters: running totals.
        expert_bytes: int64 [L].
        holds_all: whether every expert has a slot.
    """

    def __init__(self, plan: EnginePlan, residency: Residency, top_k: int) -> None:
        topology = plan.topology
        self.topology = topology
        self.residency = residency
        self.counters = HostCounters()
        self.holds_all = plan.holds_all
        layout = WaveLayout(
            layer_node=np.array([topology.device_node[d] for d in topology.layer_device], np.int32),
            layer_device=topology.layer_device,
            expert_bytes=np.array(
                [plan.table.expert_bytes(i) for i in range(topology.n_layers)], np.int64
            ),
        )
        self.expert_bytes = layout.expert_bytes
        self._slots = [plan.segment_slots(node) for node in range(max(topology.device_node) + 1)]
        self._planner = WavePlanner(
            residency, self._slots, layout, Priorities(0, 1, 2),
            AheadArrays(topology.n_layers, topology.n_experts, 0.0), max_tokens=1, top_k=top_k,
        )  # fmt: skip
        self._order = np.zeros((1, top_k), np.int32)
        self._weights = np.zeros((1, top_k), np.float32)
        self._entries = np.zeros(top_k, ENTRY)
        self._arrays = StepArrays(
            self._order, self._weights, np.zeros(top_k, np.int32), np.zeros(top_k + 1, np.int32),
            self._entries,
        )  # fmt: skip

    def fill(self, placements: Iterable[Placement]) -> None:
        """Note the slots that the residency gave to experts."""
        nodes, all_ = self._planner.arrays.layer_node, list(placements)
        for node, slots in enumerate(self._slots):
            slots.fill(p for p in all_ if nodes[p.key.layer] == node)

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""
        self.residency.follow(None if logical is None else logical.caches.resident[0])

    def decide(self, layer: int, scores: F32, logical: LogicalCache, out: Picks) -> None:
        """Route one sequence's token exactly and tell its logical cache."""
        self._take(layer, self._planner.decide(layer, scores, logical, self._arrays), out)

    def decide_by(
        self, layer: int, scores: F32, decider: Decider, prices: F32 | None, out: Picks
    ) -> None:
        """Let a rule choose for one sequence's token; `decider.out` has the rest."""
        reads = self._planner.decide_by(layer, scores, decider, prices, self._arrays)
        self._take(layer, reads, out)

    def place(self, layer: int, route: Route, out: Picks, *, decoding: bool) -> None:
        """Take a token's route that was made elsewhere."""
        reads = self._planner.place(layer, route, self._arrays)
        self._take(layer, reads, out, decoding=decoding)

    def count_hits(self, activations: int, *, decoding: bool) -> None:
        """Count (layer, token, expert) triples that devices chose or prompts wanted."""
        if decoding:
            self.counters.hits_device += activations
        else:
            self.counters.prompt_hits_device += activations

    def _take(self, layer: int, reads: int, out: Picks, *, decoding: bool = True) -> None:
        """Write the planner's step into `out`, in ascending id, and let go of it."""
        if reads:
            raise EngineError(
                f"layer {layer} wants {reads} experts that are on no device; "
                "report it with the budgets"
            )
        ids, weights = out
        np.take(self._entries["expert"], self._order[0], out=ids)
        weights[:] = self._weights[0]
        self._planner.charge(self.counters, decoding=decoding)
        self.residency.release(layer)
