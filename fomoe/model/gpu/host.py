"""The layers of a model that one GPU hosts: plain verbs, from tokens to logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.runtime import Runtime
from fomoe.kernels.gpu.step import STEP
from fomoe.model.buffers import F32
from fomoe.model.gpu.building import rehearsed
from fomoe.model.gpu.decode import Desk
from fomoe.model.gpu.handover import Handover
from fomoe.model.gpu.head import Decoded, Head
from fomoe.model.gpu.held import Held
from fomoe.model.gpu.loading import load_all, slot_counts
from fomoe.model.gpu.mail import Mail
from fomoe.model.gpu.opening import Opening
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.places import Places
from fomoe.model.gpu.planning import planned_bytes, resident_bytes, slots_bytes
from fomoe.model.gpu.program import time_program, time_steps
from fomoe.model.gpu.routes import Routes
from fomoe.model.gpu.slots import ExpertSlots
from fomoe.model.gpu.speech import Speech
from fomoe.model.gpu.states import States
from fomoe.model.gpu.transfer import Carrier, Mirror, Signal
from fomoe.model.gpu.weights import place_ends, place_layer, place_routers, place_turns
from fomoe.model.gpu.work import Work
from fomoe.model.linear import Weights
from fomoe.model.spec import ModelSpec

__all__ = ["Decoded", "GPUModel", "planned_bytes", "resident_bytes", "slots_bytes"]

I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

_F32_BYTES = 4


class GPUModel:
    """Hosts `options.layers` of a model; verbs queue work, those that return something wait.

    A pass is `begin`, `embed` or `put_hidden`, then `front`, `scores` and `back` of each layer;
    where everything is on this device, `decode` and `prefill` do all of it without the host.
    Layers go by their number in the model. Arrays that are returned stand until the next call.
    """

    def __init__(self, gpu: GPU, file: GGUFFile, spec: ModelSpec, options: HostOptions) -> None:
        """Load dense weights, if they are wanted, and take all memory but the expert slots.

        Raises:
            DeviceError: the arena is too small, or a tensor's type has no kernel.
        """
        options.check(spec)
        self.gpu, self.spec, self.options = gpu, spec, options
        self._file, self._table = file, ExpertTable.from_gguf(file, spec.n_layers)
        self.slots = ExpertSlots(gpu, self._table, spec, options.layers)
        self.states = States(gpu, spec, options)
        weights = Weights(file)
        dense = options.layers if options.is_dense else ()
        layers = {layer: place_layer(gpu, weights, spec, layer) for layer in dense}
        step, self._work = Mirror(gpu, (1,), STEP), Work.take(gpu, spec, options)
        self._handover: Handover | None = None
        if options.part != "all":
            self._handover = Handover(gpu, self._work, int8=options.int8)
        held = Held(
            layers,
            place_ends(gpu, weights, spec, embedding=options.embedding, head=options.head),
            self.states,
            self.slots,
            place_routers(gpu, weights, spec, layers) if options.ahead else {},
            self._handover,
            options.arm,
            options.late,
        )
        desk = Desk(
            gpu, spec, options.int8, options.max_tokens, self._work, step.address,
            place_turns(gpu, spec),
        )  # fmt: skip
        self._mail = Mail.of(desk, step, options)
        self._routes = Routes(self._mail, self.slots, options.layers)
        self._passes = rehearsed(desk, self._mail, held, graphs=options.graphs)
        self._head: Head | None = self._passes.head
        self._opening = Opening(gpu, spec, options, self._mail, self.states)
        self._ended = Signal(gpu, options.wait_s)
        self._speech = Speech(gpu, spec, options, self._mail, self._handover)
        self._carrier = Carrier(gpu)
        self._tokens = 1
        self._has_logits = False

    @property
    def runtime(self) -> Runtime:
        """The device's driver."""
        return self.gpu.runtime

    @property
    def stream(self) -> int:
        """The stream that computes."""
        return self.gpu.stream

    def add_slots(self, counts: Sequence[int]) -> None:
        """Take `counts[c]` expert slots of each size class of the model's `ExpertTable`."""
        self.slots.add(counts)

    def add_all_slots(self) -> None:
        """Take a slot for every expert of the hosted layers."""
        self.add_slots(slot_counts(self.slots, self._table, self.options.layers))

    def load_experts(self) -> None:
        """Read every expert of the hosted layers into a slot of its own."""
        load_all(self.slots, self._file, self._table, self.options.layers)

    def reset(self, state: int) -> None:
        """Empty a state; half a model without its dense part has none."""
        if self.options.is_dense:
            self.states.reset(state)

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make a state what another one is after `length` tokens."""
        self.states.copy(to, origin, length)

    def lend(self, places: Places) -> None:
        """Hand layers over through these, once, before any pass: the other half is elsewhere."""
        assert self._handover is not None
        self._handover.lend(places)

    def begin(self, tokens: I32, position: int, state: int = 0) -> None:
        """Begin a pass of int32 [T] at a position of a state.

        Raises:
            DeviceError: it does not fit, or the vocabulary has no such token.
        """
        self._opening.bring(tokens, position, state)
        self._tokens, self._has_logits = len(tokens), False

    def embed(self) -> None:
        """Take the tokens' embedding as the residual stream."""
        self._passes.embed(self._tokens).run()
        self._speech.end_stream(0, self._tokens)

    def put_hidden(self, address: int) -> None:
        """Take float32 [T, D] of registered host memory, at the device's address of it."""
        self._carry(self._work.x, address)

    def take_hidden(self, address: int) -> None:
        """Write the residual stream to such an address; waits for it."""
        self._carry(address, self._work.x)
        self._ended.mark()
        self._ended.wait("a residual stream")

    def _carry(self, to: int, source: int) -> None:
        """Queue the way of the residual stream."""
        self._carrier.carry(to, source, _F32_BYTES * self.spec.hidden, self._tokens)

    def front(self, layer: int, *, gives_input: bool = False) -> None:
        """Run a layer up to the router's scores; a token's can leave `input`, then not `ahead`."""
        self._passes.front(layer, self._tokens, gives_input=gives_input).run()
        self._speech.end_front(
            layer, self.slots.layout(layer), self._tokens, gives_input=gives_input
        )

    def scores(self, layer: int) -> F32:
        """Return the scores float32 [T, E] of the layer whose front ran last; waits for them."""
        return self._speech.scores(layer, self._tokens)

    def ahead(self) -> F32 | None:
        """Return the next layer's scores float32 [1, E] by a token's stream, with `scores`.

        None where the options do not ask for them, after the last layer, and for prompts.
        """
        return self._speech.ahead()

    def input(self) -> F32:
        """Return what a token's experts see, float32 [1, D], with `scores` where asked for."""
        row: F32 = self._mail.input.host
        return row

    def foreseen(self) -> tuple[int, F32] | None:
        """Return a layer and what its router says of a token's stream that goes into it.

        float32 [1, E], once for each layer, as soon as the device has it; None until then.
        """
        return self._speech.foreseen()

    def gather(self, layer: int) -> None:
        """Begin the experts of a prompt's chunk by its own choice: sort the pairs by expert."""
        self._take_prompt(layer)
        self._passes.gather(layer, self._tokens).run()

    def wave(self, layer: int, experts: I32, slots: I32) -> None:
        """Run the chunk's pairs of experts int32 [n] that lie in slots int32 [n] of their class.

        The next call waits for nothing: the work must have ended by then.
        """
        self.slots.write_wave(self._mail.wave.host, layer, zip(experts, slots, strict=True))
        self._passes.wave(layer, self._tokens).run()

    def combine(self, layer: int) -> None:
        """Close a prompt's layer once every pair has run."""
        self._passes.combine(layer, self._tokens).run()

    def back(self, layer: int, ids: I32, weights: F32) -> None:
        """Run experts int32 [T, K] with weights float32 [T, K] and close the layer.

        A token's may be fewer, ascending, where the host computes the others.

        Raises:
            DeviceError: one of them is not resident.
        """
        is_part = ids.shape[1] < self.spec.moe.top_k
        if self._tokens == 1:
            self._routes.write_token(layer, ids[0], weights[0])
        else:
            self._take_prompt(layer)
            self._routes.send_prompt(layer, ids, weights)
        self._passes.back(layer, self._tokens, is_part=is_part).run()
        self._speech.end_stream(layer + 1, self._tokens)

    def back_hits(self, layer: int, routes: tuple[I32, F32] | None, late: Bools) -> None:
        """Begin `back` of a token, `own_back` without routes, with experts that are there.

        `late` bool [K]: of the ids in ascending order, which bytes may still be on their way.

        Raises:
            DeviceError: one of the others is not resident.
        """
        self._routes.write_late(late)
        if routes is not None:
            self._routes.write_token(layer, routes[0][0], routes[1][0], late)
        self._passes.hits(layer, choose=routes is None).run()

    def back_late(self, layer: int) -> None:
        """Do the rest of it: all that was late is there, and published."""
        self._passes.late(layer).run()
        self._speech.end_stream(layer + 1, 1)

    def add(self, address: int) -> None:
        """Add float32 [D] of registered host memory to a token's residual stream."""
        self.gpu.launch(self._passes.adding(address))

    def own_back(self, layer: int) -> None:
        """Run the router's own choice, with the bits of a whole pass, and close the layer.

        All that it chooses must be resident, and published.
        """
        self._take_prompt(layer)
        self._passes.own_back(layer, self._tokens).run()
        self._speech.end_stream(layer + 1, self._tokens)

    def close_layer(self, layer: int) -> None:
        """Close a layer whose routed experts another process has run, with their sums."""
        if self._tokens > 1 and self._handover is not None:
            self._handover.take_sums(self._tokens)
        self._passes.close(layer, self._tokens).run()
        self._speech.end_stream(layer + 1, self._tokens)

    def _take_prompt(self, layer: int) -> None:
        """Bring a prompt's input from another process; a token's comes with the layer's program."""
        if self._tokens > 1 and self._handover is not None:
            self._handover.take(self.slots.layout(layer), self._tokens)

    def begin_and_front(self, tokens: I32, position: int, state: int) -> None:
        """Run `begin` of one token, `embed` and the first layer's front as one."""
        if self.options.ahead:
            self.begin(tokens, position, state)
            self.embed()
            self.front(0)
            return
        self._open(int(tokens[0]), position, state)
        self._passes.begin_and_front().run()
        self._opening.mark()
        self._speech.end_front(0, self.slots.layout(0), 1)

    def back_and_front(self, layer: int, routes: tuple[I32, F32] | None) -> None:
        """Run `back` of a token, `own_back` without routes, and the next layer's front as one."""
        if self.options.ahead:  # what the back foresees is to be heard before the front ends
            self.own_back(layer) if routes is None else self.back(layer, *routes)
            self.front(layer + 1)
            return
        if routes is not None:
            self._routes.write_token(layer, routes[0][0], routes[1][0])
        self._passes.back_and_front(layer, choose=routes is None).run()
        self._speech.end_front(layer + 1, self.slots.layout(layer + 1), 1)

    def decode(self, token: int, position: int, state: int = 0) -> None:
        """Run one token through all layers and the head, by the device's own choice."""
        self._open(token, position, state)
        self._passes.whole(1).run()
        self._opening.mark()
        self._has_logits = True

    def decoded(self) -> Decoded:
        """Return what the last `decode` came to; waits for it."""
        self._opening.wait("a token")
        assert self._head is not None
        return Decoded(*self._head.largest(), self._routes.ids, self._routes.weights)

    def prefill(self, tokens: I32, position: int, state: int = 0) -> I32:
        """Run int32 [T] through all layers by the device's own choice; waits for it.

        Returns:
            int32 [L, T, K], each layer's experts, ascending.
        """
        if len(tokens) == 1:
            self.decode(int(tokens[0]), position, state)
            return self.decoded().ids[:, None]
        self.begin(tokens, position, state)
        self._passes.whole(len(tokens)).run()
        ids = self._mail.ids
        for row in range(len(self.options.layers)):
            start, nbytes = row * ids.host[0].nbytes, len(tokens) * ids.host[0, 0].nbytes
            ids.fetch(start, nbytes)
        self._opening.mark()
        self._opening.wait("a prompt's tokens")
        chosen: I32 = ids.host[:, : len(tokens)]
        return chosen

    def logits(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> F32:
        """Return float32 [n, V] of rows of the pass; waits for them.

        Raises:
            DeviceError: the pass has no such row, too many are asked for, or no head is here.
        """
        head = self._head_of(rows)
        if not self._has_logits or len(rows) > 1:
            head.run([int(row) for row in rows])
        logits = head.fetch(len(rows))
        self._ended.mark()
        self._ended.wait("logits")
        return logits

    def largest(self, row: int | None = None) -> tuple[int, float, float]:
        """Return id, logit and log sum of a row of the pass; waits.

        None is the one row whose logits were asked for last.

        Raises:
            DeviceError: the pass has no such row, or the device no head.
        """
        head = self._head_of([] if row is None else [row])
        if row is not None and not self._has_logits:
            head.run([row])
        self._ended.mark()
        self._ended.wait("the largest logit")
        return head.largest()

    def _head_of(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Head:
        if self._head is None:
            raise DeviceError("this device hosts no head; ask the one with the last layer")
        if any(not 0 <= row < self._tokens for row in rows):
            raise DeviceError(f"logits of rows {list(rows)}: the pass has {self._tokens}")
        return self._head

    def launches(self) -> dict[int, int]:
        """Return the kernels of a decode step by the device's own choice, by layer."""
        return self._passes.launches()

    def time_launches(self, token: int, position: int, state: int = 0) -> list[tuple[str, float]]:
        """Return name and microseconds on the device of each step of a decode step, in order."""
        self._open(token, position, state)
        return time_steps(self.gpu, self._passes.whole(1))

    def time_token(self, token: int, position: int, state: int = 0, *, count: int = 20) -> float:
        """Return the milliseconds of a decode step where the device never waits for the host."""
        self._open(token, position, state)
        return time_program(self.gpu, self._passes.whole(1), count)

    def close(self) -> None:
        """Wait for the work and give the device's memory back."""
        self.gpu.close()

    def _open(self, token: int, position: int, state: int) -> None:
        """Write the step block of a token, which the program that comes next takes along."""
        self._opening.write(1, token, position, state)
        self._tokens, self._has_logits = 1, False
