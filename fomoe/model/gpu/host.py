"""The layers of a model that one GPU hosts: plain verbs, from tokens to logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile
from fomoe.kernels.gpu.bring import bring
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.rehearsal import Rehearsal
from fomoe.kernels.gpu.runtime import Runtime
from fomoe.kernels.gpu.step import STEP
from fomoe.model.buffers import F32
from fomoe.model.gpu.decode import Desk
from fomoe.model.gpu.head import Head, HeadMail
from fomoe.model.gpu.loading import load_all, slot_counts
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.passes import Held, Mail, Passes, build
from fomoe.model.gpu.planning import planned_bytes, resident_bytes, slots_bytes
from fomoe.model.gpu.program import time_steps
from fomoe.model.gpu.routes import Routes
from fomoe.model.gpu.slots import U8, ExpertSlots
from fomoe.model.gpu.states import States, StateSnapshot
from fomoe.model.gpu.transfer import Mirror, Signal
from fomoe.model.gpu.weights import place_ends, place_layer, place_routers, place_turns
from fomoe.model.gpu.work import Work
from fomoe.model.linear import Weights
from fomoe.model.spec import ModelSpec

__all__ = ["Decoded", "GPUModel", "planned_bytes", "resident_bytes", "slots_bytes"]

I32 = npt.NDArray[np.int32]

_F32_BYTES = 4
_AHEAD = 8  # decode steps that keep a device busy while the host queues launches to be timed


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decode step by the device's own choice came to.

    Attributes:
        token: the id of the largest logit (ties: the lower id).
        logit: its logit.
        log_sum: logarithm of the sum of all logits' exponentials.
        ids: int32 [L, K], each layer's experts, ascending.
        weights: float32 [L, K], in the order of `ids`.
    """

    token: int
    logit: float
    log_sum: float
    ids: I32
    weights: F32


class GPUModel:
    """Hosts `options.layers` of a model; verbs queue work, those that return something wait.

    A pass is `begin`, `embed` or `put_hidden`, then `front`, `scores` and `back` of each layer;
    where everything is on this device, `decode` and `prefill` do all of it without the host.
    Layers go by their number in the model. Arrays that are returned stand until the next call.
    """

    def __init__(self, gpu: GPU, file: GGUFFile, spec: ModelSpec, options: HostOptions) -> None:
        """Load dense weights and take all memory but the expert slots.

        Raises:
            DeviceError: the arena is too small, or a tensor's type has no kernel.
        """
        options.check(spec)
        self.gpu, self.spec, self.options = gpu, spec, options
        self._file, self._table = file, ExpertTable.from_gguf(file, spec.n_layers)
        self.slots = ExpertSlots(gpu, self._table, spec, options.layers)
        self.states = States(gpu, spec, options)
        weights = Weights(file)
        layers = {layer: place_layer(gpu, weights, spec, layer) for layer in options.layers}
        held = Held(
            layers,
            place_ends(gpu, weights, spec, embedding=options.embedding, head=options.head),
            self.states,
            self.slots,
            place_routers(gpu, weights, spec, layers) if options.ahead else {},
        )
        step, self._work = Mirror(gpu, (1,), STEP), Work.take(gpu, spec, options)
        desk = Desk(
            gpu, spec, options.int8, options.max_tokens, self._work, step.address,
            place_turns(gpu, spec),
        )  # fmt: skip
        self._mail = Mail.of(desk, step, options)
        self._routes = Routes(self._mail, self.slots, options.layers)
        self._passes = _rehearsed(desk, self._mail, held, graphs=options.graphs)
        self._head: Head | None = self._passes.head
        self._begun, self._scored, self._ended, self._spoken = (
            Signal(gpu, options.wait_s) for _ in range(4)
        )
        self._foreseen = -1  # the layer whose router is to speak about the stream that goes into it
        self._hidden_from: dict[int, Launch] = {}  # one for each device that hands over
        self._tokens = 1
        self._has_logits = self._looks_ahead = False

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

    def load_expert(self, layer: int, expert: int, slot: int, blocks: Sequence[U8]) -> None:
        """Write an expert's gate, up and down blocks into a slot, and publish it; waits."""
        self.slots.load(layer, expert, slot, blocks)
        self.slots.publish(layer)

    def load_experts(self) -> None:
        """Read every expert of the hosted layers into a slot of its own."""
        load_all(self.slots, self._file, self._table, self.options.layers)

    def reset(self, state: int) -> None:
        """Empty a state."""
        self.states.reset(state)

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make a state what another one is after `length` tokens."""
        self.states.copy(to, origin, length)

    def snapshot(self, state: int, length: int) -> StateSnapshot:
        """Return a copy of a state after `length` tokens; waits for it."""
        return self.states.snapshot(state, length)

    def restore(self, state: int, snapshot: StateSnapshot) -> None:
        """Return a state to a snapshot; waits for it."""
        self.states.restore(state, snapshot)

    def begin(self, tokens: I32, position: int, state: int = 0) -> None:
        """Begin a pass of int32 [T] at a position of a state.

        Raises:
            DeviceError: it does not fit, or the vocabulary has no such token.
        """
        count = len(tokens)
        if count > 1:
            self._check_token(int(tokens.min()))
            self._check_token(int(tokens.max()))
        self._write_step(count, int(tokens[0]) if count else 0, position, state)
        self._mail.step.send()
        if count > 1:
            self._mail.tokens.host[:count] = tokens
            self._mail.tokens.send(0, tokens.itemsize * count)
        self._begun.mark()

    def embed(self) -> None:
        """Take the tokens' embedding as the residual stream."""
        self._passes.embed(self._tokens).run()
        self._foresee(0)

    def put_hidden(self, address: int) -> None:
        """Take float32 [T, D] of registered host memory, at the device's address of it."""
        if self._tokens == 1:
            if address not in self._hidden_from:
                launch = bring(self.gpu, self._work.x, address, self._hidden_bytes)
                self._hidden_from[address] = launch
            self.gpu.launch(self._hidden_from[address])
            return
        self.runtime.copy(self._work.x, address, self._hidden_bytes, self.gpu.stream)

    def take_hidden(self, address: int) -> None:
        """Write the residual stream to an address of registered host memory; waits for it."""
        self.runtime.copy(address, self._work.x, self._hidden_bytes, self.gpu.stream)
        self._ended.mark()
        self._ended.wait("a residual stream")

    def front(self, layer: int) -> None:
        """Run a layer up to the router's scores."""
        self._looks_ahead = self.options.ahead and layer + 1 < self.spec.n_layers
        self._passes.front(layer, self._tokens).run()
        if self._tokens > 1:
            self._mail.scores.fetch(0, _F32_BYTES * self._tokens * self.spec.moe.n_experts)
        self._scored.mark()

    def scores(self, layer: int) -> F32:
        """Return the scores float32 [T, E] of the layer whose front ran last; waits for them."""
        self._scored.wait(f"the router's scores of layer {layer}")
        scores: F32 = self._mail.scores.host[: self._tokens]
        return scores

    def ahead(self) -> F32 | None:
        """Return the next layer's scores float32 [1, E] by a token's stream, with `scores`.

        None where the options do not ask for them, after the last layer, and for prompts.
        """
        if self._tokens > 1 or not self._looks_ahead:
            return None
        scores: F32 = self._mail.ahead.host
        return scores

    def foreseen(self) -> tuple[int, F32] | None:
        """Return a layer and what its router says of a token's stream that goes into it.

        float32 [1, E], once for each layer, as soon as the device has it; None until then.
        """
        if self._foreseen < 0 or not self._spoken.passed:
            return None
        layer, self._foreseen = self._foreseen, -1
        return layer, self._mail.foreseen.host

    def _foresee(self, layer: int) -> None:
        """Note what the program that was queued last ends with."""
        if self._tokens == 1 and self.options.ahead and layer < self.spec.n_layers:
            self._spoken.mark()
            self._foreseen = layer

    def gather(self, layer: int) -> None:
        """Begin the experts of a prompt's chunk by its own choice: sort the pairs by expert."""
        self._passes.gather(layer, self._tokens).run()

    def wave(self, layer: int, experts: I32, slots: I32) -> None:
        """Run the chunk's pairs of experts int32 [n] that lie in slots int32 [n] of their class.

        The next call waits for nothing: the work must have ended by then.
        """
        table = self._mail.wave.host
        table[:] = 0
        size_class, offsets = self.slots.class_of(layer), self.slots.layout(layer).offsets
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            base = self.slots.slot_address(size_class, slot)
            table[:, expert] = [base + offset for offset in offsets]
        self._passes.wave(layer, self._tokens).run()

    def combine(self, layer: int) -> None:
        """Close a prompt's layer once every pair has run."""
        self._passes.combine(layer, self._tokens).run()

    def back(self, layer: int, ids: I32, weights: F32) -> None:
        """Run experts int32 [T, K] with weights float32 [T, K] and close the layer.

        Raises:
            DeviceError: one of them is not resident.
        """
        if self._tokens == 1:
            self._routes.write_token(layer, ids[0], weights[0])
        else:
            self._routes.send_prompt(layer, ids, weights)
        self._passes.back(layer, self._tokens).run()
        self._foresee(layer + 1)

    def own_back(self, layer: int) -> None:
        """Run the router's own choice, with the bits of a whole pass, and close the layer.

        All that it chooses must be resident, and published.
        """
        self._passes.own_back(layer, self._tokens).run()
        self._foresee(layer + 1)

    def decode(self, token: int, position: int, state: int = 0) -> None:
        """Run one token through all layers and the head, by the device's own choice."""
        self._write_step(1, token, position, state)
        self._passes.whole(1).run()
        self._begun.mark()
        self._has_logits = True

    def decoded(self) -> Decoded:
        """Return what the last `decode` came to; waits for it."""
        self._begun.wait("a token")
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
        self._begun.mark()
        self._begun.wait("a prompt's tokens")
        chosen: I32 = ids.host[:, : len(tokens)]
        return chosen

    def logits(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> F32:
        """Return float32 [n, V] of rows of the pass; waits for them.

        Raises:
            DeviceError: the pass has no such row, too many are asked for, or no head is here.
        """
        if self._head is None:
            raise DeviceError("this device hosts no head; ask the one with the last layer")
        self._check_rows(rows)
        if not self._has_logits or len(rows) > 1:
            self._head.run([int(row) for row in rows])
        logits = self._head.fetch(len(rows))
        self._ended.mark()
        self._ended.wait("logits")
        return logits

    def largest(self, row: int | None = None) -> tuple[int, float, float]:
        """Return id, logit and log sum of a row of the pass; waits.

        None is the one row whose logits were asked for last.

        Raises:
            DeviceError: the pass has no such row, or the device no head.
        """
        if self._head is None:
            raise DeviceError("this device hosts no head; ask the one with the last layer")
        if row is not None:
            self._check_rows([row])
            if not self._has_logits:
                self._head.run([row])
        self._ended.mark()
        self._ended.wait("the largest logit")
        return self._head.largest()

    def _check_rows(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> None:
        if any(not 0 <= row < self._tokens for row in rows):
            raise DeviceError(f"logits of rows {list(rows)}: the pass has {self._tokens}")

    def launches(self) -> dict[int, int]:
        """Return the kernels of a decode step by the device's own choice, by layer."""
        passes = self._passes
        return {
            layer: passes.front(layer, 1).n_launches + passes.own_back(layer, 1).n_launches
            for layer in self.options.layers
        }

    def time_launches(self, token: int, position: int, state: int = 0) -> list[tuple[str, float]]:
        """Return name and microseconds on the device of each step of a decode step, in order."""
        whole = self._passes.whole(1)
        self._write_step(1, token, position, state)

        def ahead() -> None:
            for _ in range(_AHEAD):
                whole.run()

        times = time_steps(self.gpu, whole.steps, ahead)
        return [(step.name, time) for step, time in zip(whole.steps, times, strict=True)]

    def time_token(self, token: int, position: int, state: int = 0, *, count: int = 20) -> float:
        """Return the milliseconds of a decode step where the device never waits for the host."""
        whole, runtime, stream = self._passes.whole(1), self.runtime, self.gpu.stream
        self._write_step(1, token, position, state)
        first, last = runtime.event(timing=True), runtime.event(timing=True)
        whole.run()
        runtime.record(first, stream)
        for _ in range(count):
            whole.run()
        runtime.record(last, stream)
        runtime.synchronize(stream)
        return runtime.elapsed_ms(first, last) / count

    def close(self) -> None:
        """Wait for the work and give the device's memory back."""
        self.gpu.close()

    @property
    def _hidden_bytes(self) -> int:
        return _F32_BYTES * self._tokens * self.spec.hidden

    def _check_token(self, token: int) -> None:
        """Refuse what would be a row beyond the embedding: the kernel does not look."""
        if self.options.embedding and not 0 <= token < self.spec.vocab:
            raise DeviceError(f"token {token}: the vocabulary has {self.spec.vocab:,}")

    def _write_step(self, count: int, token: int, position: int, state: int) -> None:
        """Fill the host's step block once the device has read the one before."""
        options = self.options
        fits = 1 <= count <= options.max_tokens and 0 <= position <= options.ctx_size - count
        if not fits:
            raise DeviceError(
                f"{count} tokens at position {position}: a pass has 1 to {options.max_tokens}, "
                f"the context {options.ctx_size}"
            )
        self._check_token(token)
        self._begun.wait("the pass before")
        self._tokens, self._has_logits = count, False
        self._mail.step.host[0] = (token, position, count, 0, self.states.base(state))


def _rehearsed(desk: Desk, mail: Mail, held: Held, *, graphs: bool) -> Passes:
    """Return all passes, built twice: the first time shows what to compile side by side."""
    head = HeadMail.of(desk) if held.ends.head is not None else None
    rehearsal = Rehearsal(desk.gpu)
    build(replace(desk, gpu=rehearsal), mail, held, head, graphs=False)
    desk.gpu.prepare(rehearsal.jobs)
    return build(desk, mail, held, head, graphs=graphs)
