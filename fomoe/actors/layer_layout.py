"""Where the arrays of a pass lie in the arena of a device that hosts layers; the same on both ends.

One arena per device. The driver writes `tokens`, `rows`, `ids` and `weights` before the message
that names them, the device all others before its answer; the rings order the accesses. `word` is
for the next device: it holds the last step whose residual stream `hidden` is. `link` is for those
on the same link to memory, see `SharedLink`. Where the processor computes experts in RAM, `input`
is for storage, which writes `sum`, and then `sum_word`. Where the driver's process runs all but the
experts it writes `input_x` and its like and `scores_even`, too, and the device the experts' sums as
`hidden`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Regions
from fomoe.actors.shared_link import WORDS
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.places import Places
from fomoe.model.layers import HEAD_ROWS
from fomoe.model.spec import ModelSpec

_ALIGN = 256  # of device memory, too


@dataclass(frozen=True, slots=True)
class LayerViews:
    """Arrays over an arena's bytes.

    Attributes:
        word: uint64 [1].
        link: uint64 [3].
        tokens: int32 [T].
        rows: int32 [HEAD_ROWS].
        hidden: float32 [T, D].
        input_x, input_q, input_s: float32 [T, D], int8 [T, D] and float32 [T, D / 32, 2], the
            experts' input; no rows where the device makes it itself.
        scores_even, scores_odd: float32 [T, E], of layers with such numbers: while the driver reads
            one's, the device writes the next one's.
        ahead_even, ahead_odd: float32 [1, E], what the router of the layer behind would say.
        foreseen: float32 [1, E], what a layer's router says of the stream that goes into it.
        ids: int32 [T, k]; of a token in ascending order, of a prompt's best rank first.
        weights: float32 [T, k], in the order of `ids`.
        chosen: int32 [L, T, k], laid out for the T of the pass.
        input: float32 [1, D], what a token's experts see.
        sum: float32 [1, D], the weighted sum of those that storage computed.
        sum_word: uint64 [1], the last step whose sum that is.
        best: int32 [1], the id of the greatest logit of a row.
        best_logit: float32 [1].
        logits: float32 [HEAD_ROWS, V]; no rows where the device has no head.
    """

    word: npt.NDArray[np.uint64]
    link: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    hidden: npt.NDArray[np.float32]
    input_x: npt.NDArray[np.float32]
    input_q: npt.NDArray[np.int8]
    input_s: npt.NDArray[np.float32]
    scores_even: npt.NDArray[np.float32]
    scores_odd: npt.NDArray[np.float32]
    ahead_even: npt.NDArray[np.float32]
    ahead_odd: npt.NDArray[np.float32]
    foreseen: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    chosen: npt.NDArray[np.int32]
    input: npt.NDArray[np.float32]
    sum: npt.NDArray[np.float32]
    sum_word: npt.NDArray[np.uint64]
    best: npt.NDArray[np.int32]
    best_logit: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]

    def places(self, shift: int) -> Places | None:
        """Return where a layer is handed over, if it is; a device adds `shift` to addresses."""
        if not len(self.input_x):
            return None
        return Places(
            self.input_x, self.input_q, self.input_s, self.scores_even, self.hidden, shift
        )

    def scores_of(self, layer: int) -> npt.NDArray[np.float32]:
        """Return where the scores of a layer go."""
        return self.scores_odd if layer % 2 else self.scores_even

    def ahead_of(self, layer: int) -> npt.NDArray[np.float32]:
        """Return where what follows from a layer's front for the next layer goes."""
        return self.ahead_odd if layer % 2 else self.ahead_even

    def chosen_of(self, tokens: int) -> npt.NDArray[np.int32]:
        """Return `chosen` of a pass of so many tokens, int32 [L, tokens, k]."""
        n_layers, _, top_k = self.chosen.shape
        flat = self.chosen.reshape(-1)[: n_layers * tokens * top_k]
        return flat.reshape(n_layers, tokens, top_k)


class LayerArena:
    """Layout for passes of a device, by what its actor hosts."""

    def __init__(self, spec: ModelSpec, options: HostOptions) -> None:
        top_k, max_tokens, head = spec.moe.top_k, options.max_tokens, options.head
        inputs = 0 if options.is_dense else max_tokens
        parts: tuple[tuple[str, npt.DTypeLike, tuple[int, ...]], ...] = (
            ("word", np.uint64, (1,)),
            ("link", np.uint64, (WORDS,)),
            ("tokens", np.int32, (max_tokens,)),
            ("rows", np.int32, (HEAD_ROWS,)),
            ("hidden", np.float32, (max_tokens, spec.hidden)),
            ("input_x", np.float32, (inputs, spec.hidden)),
            ("input_q", np.int8, (inputs, spec.hidden)),
            ("input_s", np.float32, (inputs, spec.hidden // 32, 2)),
            ("scores_even", np.float32, (max_tokens, spec.moe.n_experts)),
            ("scores_odd", np.float32, (max_tokens, spec.moe.n_experts)),
            ("ahead_even", np.float32, (1, spec.moe.n_experts)),
            ("ahead_odd", np.float32, (1, spec.moe.n_experts)),
            ("foreseen", np.float32, (1, spec.moe.n_experts)),
            ("ids", np.int32, (max_tokens, top_k)),
            ("weights", np.float32, (max_tokens, top_k)),
            ("chosen", np.int32, (spec.n_layers, max_tokens, top_k)),
            ("input", np.float32, (1, spec.hidden)),
            ("sum", np.float32, (1, spec.hidden)),
            ("sum_word", np.uint64, (1,)),
            ("best", np.int32, (1,)),
            ("best_logit", np.float32, (1,)),
            ("logits", np.float32, (HEAD_ROWS if head else 0, spec.vocab)),
        )
        self._places: dict[str, tuple[int, npt.DTypeLike, tuple[int, ...]]] = {}
        at = 0
        for name, dtype, shape in parts:
            self._places[name] = at, dtype, shape
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            at += -(-nbytes // _ALIGN) * _ALIGN
        self.nbytes = at

    def views(self, arena: npt.NDArray[np.uint8]) -> LayerViews:
        """Return the arrays over the arena's bytes."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, (at, dtype, shape) in self._places.items():
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            arrays[name] = arena[at : at + nbytes].view(dtype).reshape(shape)
        return LayerViews(**arrays)

    def start(self, name: str) -> int:
        """Return where an array begins."""
        return self._places[name][0]

    def regions(self, arena: str, **counts: int) -> Regions:
        """Return the ranges of an arena that hold the first values of arrays, by name."""
        out = []
        for name, count in counts.items():
            at, dtype, _ = self._places[name]
            out.append((arena, at, count * np.dtype(dtype).itemsize))
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A device of the engine: its process, its arena; devices of one `link` share it."""

    name: str
    arena: str
    layout: LayerArena
    link: str = ""
