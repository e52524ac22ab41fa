"""The programs of a device: a layer's halves and whole passes, for one token and for prompts."""

from __future__ import annotations

from collections.abc import Callable

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.bring import add
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.prompt import Chunk
from fomoe.kernels.gpu.prompt_experts import Experts, pair_buffers
from fomoe.model.gpu.decode import (
    Desk,
    decode_back,
    decode_close,
    decode_front,
    decode_hits,
    decode_late,
    look_ahead,
)
from fomoe.model.gpu.head import Head, embed_steps
from fomoe.model.gpu.held import Held
from fomoe.model.gpu.mail import Mail
from fomoe.model.gpu.program import Program, Step
from fomoe.model.gpu.prompt import (
    Bucket,
    prompt_back,
    prompt_choose,
    prompt_close,
    prompt_combine,
    prompt_front,
    prompt_gather,
    prompt_wave,
)
from fomoe.model.gpu.transfer import Mirror

_LEAST_BUCKET = 32
_BUCKET_STEP = 4


def bucket_sizes(max_tokens: int) -> list[int]:
    """Return the most tokens of each bucket, ascending: a short prompt runs on small grids."""
    if max_tokens == 1:
        return []
    found, size = [max_tokens], max_tokens // _BUCKET_STEP
    while size >= _LEAST_BUCKET:
        found.append(size)
        size //= _BUCKET_STEP
    return found[::-1]


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
        self._layers = held.slots.layers
        self._one, self._many = embed_steps(desk, held.ends, mail.tokens.address)
        self._buckets = [self._bucket(tokens) for tokens in bucket_sizes(desk.tokens)]
        self._fronts: dict[tuple[int, int], list[Step]] = {}
        self._programs: dict[tuple[str, int, int], Program] = {}
        self._adding: dict[int, Launch] = {}

    def _bucket(self, tokens: int) -> Bucket:
        desk, moe = self._desk, self._desk.spec.moe
        chunk = Chunk(desk.step, tokens, desk.int8)
        pairs = {}
        for layer in self._layers if self._held.has_experts else ():
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
            for layer in self._layers:
                self._make(layer, size)
            if self._is_whole:
                self.whole(size)
        if self._one and self._held.has_experts and not self._held.ahead:
            self.begin_and_front()
        if self._held.arm:
            self.adding(0)

    def _make(self, layer: int, size: int) -> None:
        held = self._held
        if held.layers:
            self.front(layer, size)
        if not held.has_experts:
            self.close(layer, size)
            return
        self.back(layer, size)
        self.own_back(layer, size)
        if size == 1 and held.arm:
            self.front(layer, 1, gives_input=True)
            self.back(layer, 1, is_part=True)
        if size == 1 and held.late:
            self.hits(layer, choose=False)
            self.hits(layer, choose=True)
            self.late(layer)
        if size == 1 and layer + 1 in held.layers and not held.ahead:
            self.back_and_front(layer, choose=False)
            self.back_and_front(layer, choose=True)
        if size > 1:
            self.gather(layer, size)
            self.wave(layer, size)
            self.combine(layer, size)

    @property
    def _is_whole(self) -> bool:
        """Whether a pass begins and ends on this device."""
        held = self._held
        whole = len(held.layers) == self._desk.spec.n_layers
        return whole and held.has_experts and self.head is not None and bool(self._one)

    def launches(self) -> dict[int, int]:
        """Return the kernels of a decode step by the device's own choice, by layer."""
        return {
            layer: self.front(layer, 1).n_launches + self.own_back(layer, 1).n_launches
            for layer in self._layers
        }

    def embed(self, tokens: int) -> Program:
        """The embedding of a pass's tokens; DeviceError where another device has it."""
        if not self._one:
            raise DeviceError("this device hosts no embedding; ask the one with the first layer")
        if tokens == 1:
            return self._program("embed", 0, 1, lambda: [*self._one, *self._foresee(-1)])
        return self._program("embed", 0, 2, lambda: self._many)

    def front(self, layer: int, tokens: int, *, gives_input: bool = False) -> Program:
        """A layer up to its router's scores; one token's are copied to the host, too.

        So is its experts' input, if asked for, in place of the next layer's scores; and where
        another process has the experts.
        """
        size = self._size(tokens)

        def steps() -> list[Step]:
            front, handover = self._front(layer, size), self._held.handover
            if size > 1:
                return front
            if handover is None:
                n_scores = 4 * self._desk.spec.moe.n_experts
                out = Step("copy", self._mail.scores.giving(self._desk.gpu, n_scores))
            else:
                out = handover.given(self._held.slots.layout(layer))
            if gives_input:
                return [*front, out, Step("copy", self._mail.input.giving(self._desk.gpu))]
            return [*front, out, *self._spoken(layer, self._mail.ahead)]

        return self._program("front with input" if gives_input else "front", layer, size, steps)

    def _spoken(self, layer: int, mail: Mirror) -> list[Step]:
        """Steps of the next layer's router on this one's stream; none where it is not wanted."""
        router = self._held.ahead.get(layer)
        if router is None:
            return []
        return [Step("ahead", look_ahead(self._desk, router, mail.address)),
                Step("copy", mail.giving(self._desk.gpu))]  # fmt: skip

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
            weights = held.layers.get(layer)
            return [choose, *prompt_gather(self._desk, bucket, weights, layout, ids)]

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
            held, bucket = self._held, self._buckets_of(size)
            has_shared = layer in held.layers
            layout = held.slots.layout(layer)
            return [prompt_combine(self._desk, bucket, layout, has_shared=has_shared)]

        return self._program("combine", layer, size, steps)

    def close(self, layer: int, tokens: int) -> Program:
        """The end of a layer whose routed experts another process has run."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            held = self._held
            weights, handover = held.layers[layer], held.handover
            if size > 1:
                return prompt_close(self._desk, self._buckets_of(size), weights)
            assert handover is not None
            layout = held.slots.layout(layer)
            close = decode_close(self._desk, weights, layout)
            return [handover.sums_step(), close, *self._foresee(layer)]

        return self._program("close", layer, size, steps)

    def back(self, layer: int, tokens: int, *, is_part: bool = False) -> Program:
        """A layer from routes that the host has written into the mail to its end.

        A part is one token's, some of whose experts the host computes and adds.
        """
        size = self._size(tokens)

        def steps() -> list[Step]:
            if size > 1:
                return self._prompt_back(layer, size)
            decode = self._decode_back(layer, choose=False, partial=is_part)
            foresee = [] if is_part else self._foresee(layer)
            return [self._send_picks(layer), *decode, *foresee]

        return self._program("part back" if is_part else "back", layer, size, steps)

    def hits(self, layer: int, *, choose: bool) -> Program:
        """A token's `back`, or `own_back`, as far as it needs nothing of late experts."""

        def steps() -> list[Step]:
            late = Step("picks", self._mail.late.bring(self._desk.gpu))
            picks = [] if choose else [self._send_picks(layer)]
            held, at = self._held, self._picks(layer)
            hits = decode_hits(self._desk, held.slots, layer, at, choose=choose)
            return [late, *picks, *self._taken(layer), *hits]

        return self._program(f"hits {choose}", layer, 1, steps)

    def late(self, layer: int) -> Program:
        """The rest of that layer, once all experts are there and the table has them."""

        def steps() -> list[Step]:
            held, weights = self._held, self._held.layers.get(layer)
            late = decode_late(self._desk, weights, held.slots, layer, self._picks(layer))
            return [*late, *self._foresee(layer)]

        return self._program("late", layer, 1, steps)

    def adding(self, address: int) -> Launch:
        """What adds float32 [D] of pinned memory, as the device sees it, to a token's stream."""
        if address not in self._adding:
            desk = self._desk
            self._adding[address] = add(desk.gpu, desk.work.x, address, desk.spec.hidden)
        return self._adding[address]

    def own_back(self, layer: int, tokens: int) -> Program:
        """A layer from its scores to its end, by the device's own choice."""
        size = self._size(tokens)

        def steps() -> list[Step]:
            if size == 1:
                return [*self._decode_back(layer, choose=True), *self._foresee(layer)]
            choose = prompt_choose(self._desk, self._buckets_of(size), self._ids(layer))
            return [choose, *self._prompt_back(layer, size)]

        return self._program("own back", layer, size, steps)

    def begin_and_front(self) -> Program:
        """A token's step block, its embedding and the first layer's front."""

        def steps() -> list[Step]:
            step = Step("copy", self._mail.step.bring(self._desk.gpu))
            return [step, *self.embed(1).steps, *self.front(0, 1).steps]

        return self._program("begin and front", 0, 1, steps)

    def back_and_front(self, layer: int, *, choose: bool) -> Program:
        """A token's `back`, or `own_back`, and the front of the next layer: one graph to launch."""

        def steps() -> list[Step]:
            back = self.own_back(layer, 1) if choose else self.back(layer, 1)
            return [*back.steps, *self.front(layer + 1, 1).steps]

        return self._program(f"back and front {choose}", layer, 1, steps)

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

    def _send_picks(self, layer: int) -> Step:
        row, nbytes = self._row(layer), self._mail.picks.host.itemsize
        return Step("picks", self._mail.picks.bring(self._desk.gpu, row * nbytes, nbytes))

    def _decode_back(self, layer: int, *, choose: bool, partial: bool = False) -> list[Step]:
        held, own, at = self._held, self._held.layers.get(layer), self._picks(layer)
        back = decode_back(self._desk, own, held.slots, layer, at, choose=choose, partial=partial)
        return [*self._taken(layer), *back]

    def _taken(self, layer: int) -> list[Step]:
        """What brings a token's input from the process that has the other half."""
        held = self._held
        return [] if held.handover is None else [held.handover.taken(held.slots.layout(layer))]

    def _picks(self, layer: int) -> int:
        """Where the layer's picks lie on the device."""
        return self._mail.picks.address + self._row(layer) * self._mail.picks.host.itemsize

    def _prompt_back(self, layer: int, size: int) -> list[Step]:
        held, bucket = self._held, self._buckets_of(size)
        weights = held.layers.get(layer)
        return prompt_back(self._desk, bucket, weights, held.slots, layer, self._ids(layer))

    def _ids(self, layer: int) -> int:
        ids = self._mail.ids
        return ids.address + self._row(layer) * int(ids.host[0].nbytes)

    def _row(self, layer: int) -> int:
        return self._layers.index(layer)

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
