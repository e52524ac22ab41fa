"""The programs of a device: a layer's halves and whole passes, for one token and for prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fomoe.kernels.gpu.prompt import Chunk
from fomoe.kernels.gpu.prompt_experts import Experts, pair_buffers
from fomoe.kernels.gpu.step import picks
from fomoe.model.gpu.decode import Desk, decode_back, decode_front
from fomoe.model.gpu.head import Head, embed_steps
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.program import Program, Step
from fomoe.model.gpu.prompt import Bucket, prompt_back, prompt_choose, prompt_front
from fomoe.model.gpu.slots import ExpertSlots
from fomoe.model.gpu.states import States
from fomoe.model.gpu.transfer import Mirror
from fomoe.model.gpu.weights import EndMatrices, LayerMatrices

_LEAST_BUCKET = 32
_BUCKET_STEP = 4


@dataclass(frozen=True, slots=True)
class Mail:
    """What passes bring from the host and back.

    Attributes:
        step: the step block, STEP [1].
        tokens: int32 [T].
        scores: float32 [T, E].
        picks: `step.picks` [L], of one token.
        ids: int32 [L, T, K], of a prompt.
        weights: float32 [T, K], of a prompt's layer.
    """

    step: Mirror
    tokens: Mirror
    scores: Mirror
    picks: Mirror
    ids: Mirror
    weights: Mirror

    @classmethod
    def of(cls, desk: Desk, step: Mirror, options: HostOptions) -> Mail:
        """Take the memory on both sides."""
        gpu, moe, tokens = desk.gpu, desk.spec.moe, options.max_tokens
        n_layers, prompt = len(options.layers), tokens if tokens > 1 else 0
        return cls(
            step=step,
            tokens=Mirror(gpu, (tokens,), np.int32),
            scores=Mirror(gpu, (tokens, moe.n_experts), np.float32, desk.work.moe.scores),
            picks=Mirror(gpu, (n_layers,), picks(moe.top_k)),
            ids=Mirror(gpu, (n_layers, max(1, prompt), moe.top_k), np.int32),
            weights=Mirror(gpu, (max(1, prompt), moe.top_k), np.float32, desk.work.weights),
        )


def bucket_sizes(max_tokens: int) -> list[int]:
    """Return the most tokens of each bucket, ascending: a short prompt runs on small grids."""
    if max_tokens == 1:
        return []
    found, size = [max_tokens], max_tokens // _BUCKET_STEP
    while size >= _LEAST_BUCKET:
        found.append(size)
        size //= _BUCKET_STEP
    return found[::-1]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a device holds, as the builders of passes want it."""

    layers: dict[int, LayerMatrices]
    ends: EndMatrices
    states: States
    slots: ExpertSlots
    head: Head | None


class Passes:
    """Programs by layer and number of tokens; made when they are first asked for."""

    def __init__(self, desk: Desk, mail: Mail, parts: Parts, *, graphs: bool) -> None:
        self._desk = desk
        self._mail = mail
        self._parts = parts
        self._graphs = graphs
        self._one, self._many = embed_steps(desk, parts.ends, mail.tokens.address)
        self._buckets = [self._bucket(tokens) for tokens in bucket_sizes(desk.tokens)]
        self._fronts: dict[tuple[int, int], list[Step]] = {}
        self._programs: dict[tuple[str, int, int], Program] = {}

    def _bucket(self, tokens: int) -> Bucket:
        desk, moe = self._desk, self._desk.spec.moe
        chunk = Chunk(desk.step, tokens, desk.int8)
        pairs = {}
        for layer in self._parts.layers:
            layout = self._parts.slots.layout(layer)
            if layout.types not in pairs:
                experts = Experts(layout, moe.n_experts, moe.top_k)
                pairs[layout.types] = pair_buffers(desk.gpu, chunk, experts)
        return Bucket(chunk, pairs)

    def embed(self, tokens: int) -> Program:
        """The embedding of a pass's tokens."""
        steps = self._one if tokens == 1 else self._many
        return self._program("embed", 0, min(tokens, 2), lambda: steps)

    def front(self, layer: int, tokens: int) -> Program:
        """A layer up to its router's scores; one token's are copied to the host, too."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            n_scores = 4 * self._desk.spec.moe.n_experts
            fetch = Step("copy", lambda: self._mail.scores.fetch(0, n_scores))
            front = self._front(layer, size)
            return front if size > 1 else [*front, fetch]

        return self._program("front", layer, size, steps)

    def back(self, layer: int, tokens: int) -> Program:
        """A layer from routes that the host has written into the mail to its end."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            if size > 1:
                return self._prompt_back(layer, size)
            row, nbytes = self._row(layer), self._mail.picks.host.itemsize
            send = Step("copy", lambda: self._mail.picks.send(row * nbytes, nbytes))
            return [send, *self._decode_back(layer, choose=False)]

        return self._program("back", layer, size, steps)

    def own_back(self, layer: int, tokens: int) -> Program:
        """A layer from its scores to its end, by the device's own choice."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            if size == 1:
                return self._decode_back(layer, choose=True)
            choose = prompt_choose(self._desk, self._buckets_of(size), self._ids(layer))
            return [choose, *self._prompt_back(layer, size)]

        return self._program("own back", layer, size, steps)

    def whole(self, tokens: int) -> Program:
        """All layers by the device's own choice; one token's program begins with the step block.

        It ends with the logits and with the copies of what the host wants to know.
        """
        size = self._size(tokens)
        return self._program("whole", 0, size, lambda: self._whole(size))

    def _whole(self, size: int) -> list[Step]:
        layers, mail = self._parts.layers, self._mail
        if size > 1:
            steps = list(self._many)
            for layer in layers:
                choose = prompt_choose(self._desk, self._buckets_of(size), self._ids(layer))
                steps += [*self._front(layer, size), choose, *self._prompt_back(layer, size)]
            return steps
        steps = [Step("copy", mail.step.send), *self._one]
        for layer in layers:
            steps += [*self._front(layer, 1), *self._decode_back(layer, choose=True)]
        head = self._parts.head
        assert head is not None
        return [*steps, *head.token_steps(), Step("copy", mail.picks.fetch)]

    def _front(self, layer: int, size: int) -> list[Step]:
        """Steps that a layer's front and whole passes share: their builders take memory."""
        if (layer, size) not in self._fronts:
            weights, place = self._parts.layers[layer], self._parts.states.place(layer)
            if size == 1:
                made = decode_front(self._desk, weights, place)
            else:
                made = prompt_front(self._desk, self._buckets_of(size), weights, place)
            self._fronts[layer, size] = made
        return self._fronts[layer, size]

    def _decode_back(self, layer: int, *, choose: bool) -> list[Step]:
        picked = self._mail.picks
        address = picked.address + self._row(layer) * picked.host.itemsize
        parts = self._parts
        return decode_back(
            self._desk, parts.layers[layer], parts.slots, layer, address, choose=choose
        )

    def _prompt_back(self, layer: int, size: int) -> list[Step]:
        parts, bucket = self._parts, self._buckets_of(size)
        return prompt_back(
            self._desk, bucket, parts.layers[layer], parts.slots, layer, self._ids(layer)
        )

    def _ids(self, layer: int) -> int:
        ids = self._mail.ids
        return ids.address + self._row(layer) * ids.host[0].nbytes

    def _row(self, layer: int) -> int:
        return list(self._parts.layers).index(layer)

    def _size(self, tokens: int) -> int:
        """Return 1, or the size of the smallest bucket that holds so many tokens."""
        if tokens == 1:
            return 1
        return next(b.tokens for b in self._buckets if b.tokens >= tokens)

    def _buckets_of(self, size: int) -> Bucket:
        return next(b for b in self._buckets if b.tokens == size)

    def _program(
        self, kind: str, layer: int, size: int, steps: Callable[[], list[Step]]
    ) -> Program:
        key = kind, layer, size
        if key not in self._programs:
            self._programs[key] = Program(self._desk.gpu, steps(), graphs=self._graphs)
        return self._programs[key]
