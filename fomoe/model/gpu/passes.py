"""The programs of a device: a layer's halves and whole passes, for one token and for prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.prompt import Chunk
from fomoe.kernels.gpu.prompt_experts import Experts, pair_buffers
from fomoe.kernels.gpu.step import picks
from fomoe.model.gpu.decode import Desk, decode_back, decode_front, look_ahead
from fomoe.model.gpu.head import Head, HeadMail, embed_steps
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.program import Program, Step
from fomoe.model.gpu.prompt import (
    Bucket,
    prompt_back,
    prompt_choose,
    prompt_combine,
    prompt_front,
    prompt_gather,
    prompt_wave,
)
from fomoe.model.gpu.slots import ExpertSlots
from fomoe.model.gpu.states import States
from fomoe.model.gpu.transfer import Mirror
from fomoe.model.gpu.weights import EndMatrices, LayerMatrices, RouterMatrices

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
        wave: uint64 [3, E], where the experts of a prompt's wave lie; zeros for all others.
        ahead: float32 [1, E], scores of the next layer's router.
        foreseen: the same, by the residual stream that goes into that layer.
    """

    step: Mirror
    tokens: Mirror
    scores: Mirror
    picks: Mirror
    ids: Mirror
    weights: Mirror
    wave: Mirror
    ahead: Mirror
    foreseen: Mirror

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
            wave=Mirror(gpu, (3, moe.n_experts), np.uint64),
            ahead=Mirror(gpu, (1, moe.n_experts), np.float32),
            foreseen=Mirror(gpu, (1, moe.n_experts), np.float32),
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
class Held:
    """What a device holds, as the builders of passes want it; `ahead` are next layers' routers.

    Those are by the layer before; the first layer's own, where it is here, stands at -1.
    """

    layers: dict[int, LayerMatrices]
    ends: EndMatrices
    states: States
    slots: ExpertSlots
    ahead: dict[int, RouterMatrices]


def build(
    desk: Desk, mail: Mail, held: Held, head_mail: HeadMail | None, *, graphs: bool
) -> Passes:
    """Return the passes of a device with every program made."""
    head = None if head_mail is None else Head(desk, held.ends, head_mail)
    passes = Passes(desk, mail, held, head, graphs=graphs)
    passes.make_all()
    return passes


class Passes:
    """Programs by layer and number of tokens; made when they are first asked for."""

    def __init__(
        self, desk: Desk, mail: Mail, held: Held, head: Head | None, *, graphs: bool
    ) -> None:
        self.head = head
        self._desk = desk
        self._mail = mail
        self._held = held
        self._graphs = graphs
        self._one, self._many = embed_steps(desk, held.ends, mail.tokens.address)
        self._buckets = [self._bucket(tokens) for tokens in bucket_sizes(desk.tokens)]
        self._fronts: dict[tuple[int, int], list[Step]] = {}
        self._programs: dict[tuple[str, int, int], Program] = {}

    def _bucket(self, tokens: int) -> Bucket:
        desk, moe = self._desk, self._desk.spec.moe
        chunk = Chunk(desk.step, tokens, desk.int8)
        pairs = {}
        for layer in self._held.layers:
            layout = self._held.slots.layout(layer)
            if layout.types not in pairs:
                experts = Experts(layout, moe.n_experts, moe.top_k)
                pairs[layout.types] = pair_buffers(desk.gpu, chunk, experts)
        return Bucket(chunk, pairs)

    def make_all(self) -> None:
        """Make every program that passes of this device can want."""
        for size in [1, *(bucket.tokens for bucket in self._buckets)]:
            if self._one:
                self.embed(size)
            for layer in self._held.layers:
                self.front(layer, size)
                self.back(layer, size)
                self.own_back(layer, size)
                if size > 1:
                    self.gather(layer, size)
                    self.wave(layer, size)
                    self.combine(layer, size)
            if self._is_whole:
                self.whole(size)

    @property
    def _is_whole(self) -> bool:
        """Whether a pass begins and ends on this device."""
        whole = len(self._held.layers) == self._desk.spec.n_layers
        return whole and self.head is not None and bool(self._one)

    def embed(self, tokens: int) -> Program:
        """The embedding of a pass's tokens; DeviceError where another device has it."""
        if not self._one:
            raise DeviceError("this device hosts no embedding; ask the one with the first layer")
        if tokens == 1:
            return self._program("embed", 0, 1, lambda: [*self._one, *self._foresee(-1)])
        return self._program("embed", 0, 2, lambda: self._many)

    def front(self, layer: int, tokens: int) -> Program:
        """A layer up to its router's scores; one token's are copied to the host, too."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            n_scores = 4 * self._desk.spec.moe.n_experts
            fetch = Step("copy", lambda: self._mail.scores.fetch(0, n_scores))
            front = self._front(layer, size)
            if size > 1:
                return front
            return [*front, fetch, *self._spoken(layer, self._mail.ahead)]

        return self._program("front", layer, size, steps)

    def _spoken(self, layer: int, mail: Mirror) -> list[Step]:
        """Steps of the next layer's router on this one's stream; none where it is not wanted."""
        router = self._held.ahead.get(layer)
        if router is None:
            return []
        return [Step("ahead", look_ahead(self._desk, router, mail.address)),
                Step("copy", mail.fetch)]  # fmt: skip

    def _foresee(self, layer: int) -> list[Step]:
        """The same of a stream that goes into the next layer."""
        return self._spoken(layer, self._mail.foreseen)

    def gather(self, layer: int, tokens: int) -> Program:
        """A prompt's layer from its scores up to its pairs sorted by expert, by its own choice."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            bucket, held, ids = self._buckets_of(size), self._held, self._ids(layer)
            layout = held.slots.layout(layer)
            choose = prompt_choose(self._desk, bucket, ids)
            return [choose, *prompt_gather(self._desk, bucket, held.layers[layer], layout, ids)]

        return self._program("gather", layer, size, steps)

    def wave(self, layer: int, tokens: int) -> Program:
        """The pairs of those experts that the mail's table of a wave has."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            bucket, layout = self._buckets_of(size), self._held.slots.layout(layer)
            table = self._mail.wave
            send = Step("copy", table.send)
            return [send, *prompt_wave(self._desk, bucket, layout, table.address)]

        return self._program("wave", layer, size, steps)

    def combine(self, layer: int, tokens: int) -> Program:
        """The end of a prompt's layer, whose pairs have all run."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            layout = self._held.slots.layout(layer)
            return [prompt_combine(self._desk, self._buckets_of(size), layout)]

        return self._program("combine", layer, size, steps)

    def back(self, layer: int, tokens: int) -> Program:
        """A layer from routes that the host has written into the mail to its end."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            if size > 1:
                return self._prompt_back(layer, size)
            row, nbytes = self._row(layer), self._mail.picks.host.itemsize
            send = Step("picks", self._mail.picks.bring(self._desk.gpu, row * nbytes, nbytes))
            return [send, *self._decode_back(layer, choose=False), *self._foresee(layer)]

        return self._program("back", layer, size, steps)

    def own_back(self, layer: int, tokens: int) -> Program:
        """A layer from its scores to its end, by the device's own choice."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            if size == 1:
                return [*self._decode_back(layer, choose=True), *self._foresee(layer)]
            choose = prompt_choose(self._desk, self._buckets_of(size), self._ids(layer))
            return [choose, *self._prompt_back(layer, size)]

        return self._program("own back", layer, size, steps)

    def whole(self, tokens: int) -> Program:
        """All layers by the device's own choice; one token's program begins with the step block.

        It ends with the logits and with the copies of what the host wants to know.

        Raises:
            DeviceError: the device hosts a part of the model only.
        """
        if not self._is_whole:
            raise DeviceError(
                f"a whole pass on {len(self._held.layers)} of {self._desk.spec.n_layers} layers: "
                "run it half a layer at a time, over all devices"
            )
        size = self._size(tokens)
        return self._program("whole", 0, size, lambda: self._whole(size))

    def _whole(self, size: int) -> list[Step]:
        layers, mail = self._held.layers, self._mail
        if size > 1:
            steps = list(self._many)
            for layer in layers:
                choose = prompt_choose(self._desk, self._buckets_of(size), self._ids(layer))
                steps += [*self._front(layer, size), choose, *self._prompt_back(layer, size)]
            return steps
        steps = [Step("copy", mail.step.send), *self._one]
        for layer in layers:
            steps += [*self._front(layer, 1), *self._decode_back(layer, choose=True)]
        assert self.head is not None
        return [*steps, *self.head.token_steps(), Step("copy", mail.picks.fetch)]

    def _front(self, layer: int, size: int) -> list[Step]:
        """Steps that a layer's front and whole passes share: their builders take memory."""
        if (layer, size) not in self._fronts:
            weights, place = self._held.layers[layer], self._held.states.place(layer)
            if size == 1:
                made = decode_front(self._desk, weights, place)
            else:
                made = prompt_front(self._desk, self._buckets_of(size), weights, place)
            self._fronts[layer, size] = made
        return self._fronts[layer, size]

    def _decode_back(self, layer: int, *, choose: bool) -> list[Step]:
        picked = self._mail.picks
        address = picked.address + self._row(layer) * picked.host.itemsize
        held = self._held
        return decode_back(
            self._desk, held.layers[layer], held.slots, layer, address, choose=choose
        )

    def _prompt_back(self, layer: int, size: int) -> list[Step]:
        held, bucket = self._held, self._buckets_of(size)
        return prompt_back(
            self._desk, bucket, held.layers[layer], held.slots, layer, self._ids(layer)
        )

    def _ids(self, layer: int) -> int:
        ids = self._mail.ids
        return ids.address + self._row(layer) * int(ids.host[0].nbytes)

    def _row(self, layer: int) -> int:
        return list(self._held.layers).index(layer)

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
