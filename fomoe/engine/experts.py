"""Where routed experts are computed: the contract of the layer loop, and the simplest host."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.engine.decisions import Decider
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile
from fomoe.kernels.device import ExpertShape, open_device
from fomoe.model.buffers import F32, Buffer
from fomoe.model.spec import ModelSpec
from fomoe.residency import LogicalCache
from fomoe.routing import Route, group_by_expert, route_exact


class ExpertHost(Protocol):
    """Computes a layer's routed experts; one step is under way at a time."""

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of one expert of each layer, int64 [L]."""

    @property
    def guess_depth(self) -> int:
        """For how many of the next layers a decode step is to call `look_ahead` now."""

    def begin(self, layer: int, h: F32, route: Route, *, decoding: bool) -> None:
        """Plan the layer, send demand reads out first, start what is resident."""

    def decide(
        self, layer: int, h: F32, scores: F32, logical: LogicalCache, *, decoding: bool
    ) -> None:
        """Route one sequence's tokens exactly, tell its logical cache, and begin."""

    def decide_by(
        self, layer: int, h: F32, scores: F32, decider: Decider, prices: F32 | None
    ) -> None:
        """Let a rule choose for one sequence's decode step, and begin; `decider.out` has it.

        `prices` float32 [1] stands in for the rule's own.
        """

    def read_later(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Load experts that were wanted and did not run, behind all demand; never waits."""

    def look_ahead(self, layer: int, scores: F32, depth: int = 1) -> None:
        """Load what `layer`, `depth` further on, will want, behind all demand; never waits."""

    def open_prompt(self, tokens: int) -> None:
        """Begin a chunk of a prompt: `look_ahead` may be called for its first layers."""

    def may_guess(self, layer: int) -> bool:
        """Whether a look-ahead at the layer, in the prompt under way, can save time."""

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""

    def finish(self) -> F32:
        """Wait for the step begun last and return the routed sum float32 [T, D]."""


class ResidentExperts:
    """Every expert in this process's memory: the reference host, without tiers or actors."""

    def __init__(
        self, file: GGUFFile, spec: ModelSpec, max_tokens: int, *, int8: bool, threads: int
    ) -> None:
        table = ExpertTable.from_gguf(file)
        self._spec = spec
        self._device = open_device("cpu", threads=threads, int8=int8)
        self.expert_bytes = np.array(
            [table.expert_bytes(i) for i in range(spec.n_layers)], np.int64
        )
        sizes = spec.hidden, spec.moe.expert_width
        self._shapes = [ExpertShape.of(table, i, *sizes) for i in range(spec.n_layers)]
        self._tensors: list[npt.NDArray[np.uint8]] = []
        self._addresses = [self._load(file, table, i) for i in range(spec.n_layers)]
        self._pairs = Buffer(max_tokens * spec.moe.top_k, spec.hidden)
        self._routed = Buffer(max_tokens, spec.hidden)
        self._result = self._routed.at(1)

    def _load(self, file: GGUFFile, table: ExpertTable, layer: int) -> npt.NDArray[np.uint64]:
        """Read a layer's expert tensors; returns addresses uint64 [3, E] of gate, up, down."""
        starts = []
        for part in table.part_names:
            data = file.read(f"blk.{layer}.ffn_{part}_exps.weight")
            self._tensors.append(data)
            stride = data.nbytes // self._spec.moe.n_experts
            starts.append((data.ctypes.data, stride))
        ids = np.arange(self._spec.moe.n_experts, dtype=np.uint64)
        columns = [np.uint64(base) + ids * np.uint64(stride) for base, stride in starts]
        if len(columns) == 2:  # fused: the gate's rows lie before the up projection's
            columns.insert(1, columns[0] + np.uint64(starts[0][1] // 2))
        return np.stack(columns)

    def begin(self, layer: int, h: F32, route: Route, *, decoding: bool) -> None:
        """Compute the whole layer at once."""
        del decoding
        groups = group_by_expert(route.ids)
        tokens, top_k = route.ids.shape
        pairs = self._pairs.at(tokens * top_k)
        addresses = np.ascontiguousarray(self._addresses[layer][:, groups.experts])
        self._device.experts(
            self._shapes[layer], addresses, h, groups.pair_start, groups.pair_token, pairs
        )
        self._result = self._routed.at(tokens)
        self._device.reduce(pairs, groups.order, groups.arrange(route.weights), self._result)

    def decide(
        self, layer: int, h: F32, scores: F32, logical: LogicalCache, *, decoding: bool
    ) -> None:
        """Route one sequence's tokens exactly and compute the layer."""
        route = route_exact(scores, self._spec.moe.top_k)
        logical.observe(layer, route.ids)
        self.begin(layer, h, route, decoding=decoding)

    def decide_by(
        self, layer: int, h: F32, scores: F32, decider: Decider, prices: F32 | None
    ) -> None:
        """Let a rule choose for one sequence's decode step and compute the layer."""
        made = decider.decide(layer, scores, prices=prices)
        self.begin(layer, h, Route(made.ids, made.weights, made.substituted), decoding=True)

    def read_later(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Everything is resident already."""

    @property
    def guess_depth(self) -> int:
        """Everything is resident already."""
        return 0

    def look_ahead(self, layer: int, scores: F32, depth: int = 1) -> None:
        """Everything is resident already."""

    def open_prompt(self, tokens: int) -> None:
        """Everything is resident already."""

    def may_guess(self, layer: int) -> bool:
        """Everything is resident already."""
        del layer
        return False

    def follow(self, logical: LogicalCache | None) -> None:
        """Everything is resident already."""

    def finish(self) -> F32:
        """Return what `begin` computed."""
        return self._result
