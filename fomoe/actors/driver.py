"""Driver actor: owns the sequences, the layer loop, routing and every residency decision."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from fomoe.actors.driver_dense import OwnDevices, open_devices
from fomoe.actors.hands import Engine, ExpertHands, Hands, LayerHands
from fomoe.actors.messages import Cancel, LogitsRequest, LogitsRows, StatusRequest
from fomoe.actors.names import CLIENT, device_name, storage_name
from fomoe.actors.process import FabricMember, LoopThread, log
from fomoe.actors.wire import MessagePort
from fomoe.config import EngineConfig
from fomoe.engine.arm import arm_text
from fomoe.engine.fill import read_profile
from fomoe.engine.generation import Generation, check_request
from fomoe.engine.hosting import dense_bytes
from fomoe.engine.local import sequence_logits
from fomoe.engine.meter import Meter
from fomoe.engine.plan import make_plan
from fomoe.engine.recorder import Recorder
from fomoe.engine.requests import EngineStatus, Finished, GenerateRequest, Receipt
from fomoe.engine.sequences import Sequence
from fomoe.engine.series import engine_series, tier_bytes
from fomoe.errors import (
    ChannelError,
    DeviceError,
    EngineError,
    FomoeError,
    PeerDeadError,
    RequestCancelledError,
    RequestError,
)
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.kernels.cpu import ops
from fomoe.model.archs import read_spec
from fomoe.model.layers import DenseModel
from fomoe.model.state import HostedState
from fomoe.quality import Quality
from fomoe.telemetry import Growing
from fomoe.traces import TraceFacts, TraceWriter

_ROWS_PER_MESSAGE = 64


class DriverActor(FabricMember):
    """Serves requests one after the other; several may be open, the others wait in order."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._loop: LoopThread | None = None
        self._progress = 0.0
        self._queue: deque[GenerateRequest | LogitsRequest] = deque()
        self._running: Generation | None = None
        self._cancelled = False  # the request under way, in the middle of a pass
        self._in_pass = False
        self._rate = 0.0
        self._recorder: Recorder | None = None
        self._growing = Growing()
        self._own: OwnDevices | None = None

    def open(self, config: dict[str, Any], device_node: list[int], threads: int) -> None:
        """Read the dense weights, reserve the sequences' state; experts are not touched."""
        self._config = EngineConfig.from_dict(config)
        ops.set_threads(threads)
        file = open_gguf(Path(self._config.model))
        self._spec = read_spec(file)
        self._plan = make_plan(
            ExpertTable.from_gguf(file, self._spec.n_layers), self._spec, self._config,
            tuple(device_node), dense_bytes(file, self._spec, self._config),
        )  # fmt: skip
        path = self._config.profile
        shape = self._spec.n_layers, self._spec.moe.n_experts
        self._frequencies = None if path is None else read_profile(path, *shape)
        hosted = self._config.hosts_layers
        self._model = None if hosted else self._read_model(file)
        if self._config.splits_layers:
            on_devices = self._plan.on_devices
            self._own = open_devices(file, self._spec, self._config, on_devices=on_devices)
        self._sequence = Sequence(
            self._spec, self._config.ctx_size, self._config.kv_dtype,
            self._plan.logical_rules(self._config.routing), self._frequencies,
            HostedState(self._config.ctx_size) if hosted else None,
        )  # fmt: skip
        self._recorder = self._open_recorder()

    def _read_model(self, file: GGUFFile) -> DenseModel:
        count = self._spec.n_layers

        def on_layer(layer: int) -> None:
            self._progress = 0.5 * (layer + 1) / count

        return DenseModel(
            file, self._spec, self._config.prefill_chunk, int8=self._config.activations == "int8",
            stored_embedding=not self._plan.holds_all, on_layer=on_layer,
        )  # fmt: skip

    def _open_recorder(self) -> Recorder | None:
        config, spec, table = self._config, self._spec, self._plan.table
        if config.trace is None:
            return None
        facts = TraceFacts(
            model=config.model.stem, n_layers=spec.n_layers, n_experts=spec.moe.n_experts,
            top_k=spec.moe.top_k,
            expert_bytes=tuple(table.expert_bytes(layer) for layer in range(spec.n_layers)),
        )  # fmt: skip
        return Recorder(TraceWriter(config.trace, facts), config.prefill_chunk)

    def start(self, arm: tuple[int, ...] = ()) -> None:
        """Begin to fill the tiers and then to serve; `progress` tells how far it is.

        `arm` is the table of experts that are computed in RAM beside GPUs, see `Engine`.
        """
        self._client = MessagePort(self.fabric, CLIENT)
        engine = Engine(self._config, self._spec, self._plan, arm)
        self._hands: Hands
        if self._model is None:
            self._hands = LayerHands(self.fabric, engine, self._own)
        else:
            self._hands = ExpertHands(self.fabric, engine, self._model)
        self._forward = self._hands.loop
        self._forward.recorder = self._recorder
        self._fastest = "vram" if self._config.hosts_layers else "device (emulated)"
        self._meter = Meter(
            self._hands.counters, self._forward.brain.loss, self._forward.watch,
            devices=self._fastest, capacity=self._plan.logical_capacity, cpu_arm=arm_text(arm),
        )  # fmt: skip
        if any(arm):
            log.info(
                "%s: of 0, 1, 2 .. experts in RAM storage computes %s", self.name, arm_text(arm)
            )
        self._hands.watch(self._checkpoint)
        self._filled = False
        nodes = self._plan.topology.device_node
        self._peers = [device_name(i) for i in range(len(nodes))]
        self._peers += [storage_name(i) for i in range(max(nodes) + 1)]
        self._loop = LoopThread(self, self.poll, self.status_line)
        self._loop.start()

    def progress(self) -> float:
        """Return how much of loading is done, 0 to 1; raises what ended the loop."""
        if self._loop is not None and self._loop.error is not None:
            raise self._loop.error
        return self._progress

    def poll(self) -> bool:
        """Take the client's messages, then advance the request under way by one step."""
        if not self._filled:
            self._hands.fill(self._frequencies, self._report_fill)
            self._progress = 1.0
            self._filled = True
        busy = False
        while (message := self._client.receive()) is not None:
            self._take(message)
            busy = True
        if self._running is None and self._queue:
            self._begin(self._queue.popleft())
            return True
        if self._running is not None:
            self._advance(self._running)
            return True
        if not busy:
            self._look_around()
        return busy

    def _report_fill(self, done: float) -> None:
        self._progress = 0.5 + 0.5 * done

    def _look_around(self) -> None:
        """Hear what actors say between requests; one that has died ends the loop.

        Raises:
            PeerDeadError, DeviceError: an actor is not there any more; the client has been told.
        """
        try:
            self._hands.settle()
            for name in self._peers:
                if self.fabric.peer_dead(name):
                    raise PeerDeadError(name)
        except (ChannelError, DeviceError) as error:
            self._client.send(EngineStatus(state="degraded", detail=str(error)))
            raise

    def _take(self, message: object) -> None:
        if isinstance(message, GenerateRequest | LogitsRequest):
            self._queue.append(message)
        elif isinstance(message, Cancel):
            self._cancel(message.request_id)
        elif isinstance(message, StatusRequest):
            self._client.send(self.status())
        else:
            log.warning("%s: unexpected %s", self.name, type(message).__name__)

    def _cancel(self, request_id: str) -> None:
        running = self._running
        if running is not None and running.request.request_id == request_id:
            if self._in_pass:
                self._cancelled = True
                return
            self._client.send(running.cancel())
            self._running = None
            return
        for waiting in self._queue:
            if waiting.request_id == request_id:
                self._queue.remove(waiting)
                self._client.send(Finished(request_id=request_id, reason="cancelled"))
                return

    def _begin(self, request: GenerateRequest | LogitsRequest) -> None:
        self._cancelled = False
        try:
            self._hands.settle()  # what is taken back now the request before had counted
            if isinstance(request, LogitsRequest):
                self._logits(request)
                return
            self._running = Generation(
                request, self._sequence, self._forward, self._meter,
                chunk=self._config.prefill_chunk, routing=self._config.routing,
                serial=not self._config.overlap,
            )  # fmt: skip
            self._running.watch(self._client.send, self._checkpoint)
        except FomoeError as error:
            if not isinstance(error, RequestError):  # refused before anything was touched
                self._sequence.reset()
            self._fail(request.request_id, error)

    def _advance(self, running: Generation) -> None:
        self._in_pass, self._cancelled = True, False
        try:
            events = running.step()
        except RequestCancelledError:
            self._running = None
            self._client.send(running.abandon())
            return
        except FomoeError as error:
            self._running = None
            running.fail(str(error))
            self._fail(running.request.request_id, error)
            return
        finally:
            self._in_pass = False
        if self._cancelled and not running.finished:  # the last layer was done before it came
            self._cancel(running.request.request_id)
            return
        if running.finished:
            self._running = None
        for event in events:
            self._client.send(event)

    def _checkpoint(self) -> None:
        """Take the client's messages in the middle of a prompt, which may end here.

        Raises:
            RequestCancelledError: its reader has gone, or this process is to end.
        """
        while (message := self._client.receive()) is not None:
            self._take(message)
        if self._cancelled:
            raise RequestCancelledError("the reader of the answer has gone")
        assert self._loop is not None
        if self._loop.stopping:
            raise EngineError("the engine is stopping; ask again when it is up")
        self._loop.report()

    def _fail(self, request_id: str, error: FomoeError) -> None:
        """End a request with an error; one that the engine cannot survive ends the loop."""
        fatal = isinstance(error, ChannelError | DeviceError)
        if fatal:  # first, so that whoever sees the request end knows why
            self._client.send(EngineStatus(state="degraded", detail=str(error)))
        self._client.send(
            Finished(request_id=request_id, reason="error", error=str(error), receipt=Receipt())
        )
        if fatal:
            raise error

    def _logits(self, request: LogitsRequest) -> None:
        """Answer with the logits of every position; the sequence starts afresh."""
        sequence = self._sequence
        sequence.reset()
        whole = GenerateRequest(request_id=request.request_id, prompt=request.tokens, max_tokens=0)
        check_request(whole, sequence.state.ctx_size, self._spec.vocab)
        self._forward.follow(None)
        self._meter.start(Quality(), cached=0)
        logits = sequence_logits(
            self._forward, sequence, request.tokens, self._config.prefill_chunk
        )
        self._meter.prompt_done(len(request.tokens))
        for start in range(0, len(logits), _ROWS_PER_MESSAGE):
            rows = logits[start : start + _ROWS_PER_MESSAGE]
            self._client.send(
                LogitsRows(request_id=request.request_id, start=start, data=rows.tobytes())
            )
        receipt = self._meter.receipt(sequence.logical.hash)
        self._client.send(Finished(request_id=request.request_id, reason="length", receipt=receipt))

    def reach(self, depth: int) -> None:
        """Let decode look so many layers ahead from the next token on; to compare ways."""
        self._hands.reach(depth)

    def status(self) -> EngineStatus:
        """Return the present state and the running totals, none of which falls."""
        return EngineStatus(
            state="ready",
            load_progress=self._progress,
            running=int(self._running is not None),
            queued=len(self._queue),
            counters=self._growing.of(self.stats()),
        )

    def status_line(self) -> str:
        """Return one line for the log."""
        c = self._meter.host
        total = max(1, c.hits_device + c.hits_ram + c.reads_nvme)
        if self._running is not None and self._running.in_prompt:
            done, of = self._running.prompt_tokens
            return f"prompt {done:,} of {of:,} tokens  queued {len(self._queue)}"
        return (
            f"{self._meter.rate():.1f} tok/s  {self._fastest} {c.hits_device / total:.0%}  "
            f"ram {c.hits_ram / total:.0%}  nvme {c.reads_nvme / total:.0%}  "
            f"stalled {c.stall_s:.1f} s  queued {len(self._queue)}"
        )

    def stats(self) -> dict[str, float]:
        """Return the running totals under their metric names."""
        residency = self._hands.residency
        return engine_series(self._meter, residency.counters, tier_bytes(self._plan, residency))

    def stop(self) -> None:
        """End the loop after the present step."""
        if self._loop is not None:
            self._loop.stop()
        if self._recorder is not None:
            self._recorder.close()

    def leave(self) -> None:
        """Leave the fabric and the devices; a loop that hangs in one would still use it."""
        super().leave()
        if self._own is not None and (self._loop is None or not self._loop.alive):
            self._own.close()
