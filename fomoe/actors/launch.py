"""Brings an engine up and takes it down; says nothing of how its processes are started."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fomoe.actors.arm_plan import arm_plan, has_arm
from fomoe.actors.channel import FabricSpec
from fomoe.actors.client import EngineClient
from fomoe.actors.gpu import DevicePlan
from fomoe.actors.layers import LayerPlan, neighbours
from fomoe.actors.layout import StepArena
from fomoe.actors.names import ARM_NODE, CLIENT, DRIVER, arena_name, device_name, storage_name
from fomoe.actors.storage import StoragePlan
from fomoe.config import EngineConfig
from fomoe.devices import local_name
from fomoe.engine.arm import ArmCosts, arm_table, fixed_table
from fomoe.engine.hosting import dense_bytes
from fomoe.engine.plan import EnginePlan, make_plan
from fomoe.engine.requests import EngineStatus
from fomoe.errors import EngineError, FomoeError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile
from fomoe.model.spec import ModelSpec

_CALL_S = 60.0
_LOAD_S = 3600.0  # to read weights, and to reserve or pin hundreds of GB
_STOP_S = 5.0


class Handle(Protocol):
    """The launcher's end of one actor, whatever it runs on."""

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method of the actor; the future carries its result or its exception."""

    def kill(self) -> None:
        """End the actor's process."""


@dataclass(frozen=True, slots=True)
class Box:
    """A machine that takes part: its name for the control plane and its address."""

    name: str
    host: str


@dataclass(frozen=True, slots=True)
class Site:
    """Where an engine's processes go: boxes (the first is the driver's) and each device's box."""

    boxes: tuple[Box, ...]
    device_box: tuple[int, ...]
    cores: int


Spawn = Callable[[str, str, int], Handle]  # role, process name, box


class RunningEngine:
    """An engine that is up: its client, its plan, its actors."""

    def __init__(self, client: EngineClient, plan: EnginePlan, handles: dict[str, Handle]) -> None:
        self.client = client
        self.plan = plan
        self.handles = handles

    def stop(self) -> None:
        """Ask every actor to stop, then end it; bounded whatever state they are in."""
        self.client.quiet()
        driver = self.handles.get(DRIVER)
        others = [handle for name, handle in self.handles.items() if name != DRIVER]
        # Loops end before anyone leaves the fabric, so that no peer takes another one for dead.
        _call_each("stop", [] if driver is None else [driver])
        _call_each("stop", others)
        _call_each("leave", list(self.handles.values()))
        self.client.close()
        for handle in self.handles.values():
            with contextlib.suppress(Exception):
                handle.kill()


def _call_each(method: str, handles: list[Handle]) -> None:
    calls = []
    for handle in handles:
        with contextlib.suppress(Exception):
            calls.append(handle.call(method))
    deadline = time.monotonic() + _STOP_S
    for call in calls:
        with contextlib.suppress(Exception):  # dead or stuck: it is killed
            call.result(max(0.1, deadline - time.monotonic()))


def launch(
    file: GGUFFile, spec: ModelSpec, config: EngineConfig, site: Site, spawn: Spawn,
    on_progress: Callable[[float, str], None] | None = None,
) -> RunningEngine:  # fmt: skip
    """Start the actors of `config` (budgets explicit) and return when requests can be answered.

    Raises what an actor raised; nothing of the engine is left then.
    """
    table = ExpertTable.from_gguf(file, spec.n_layers)
    plan = make_plan(table, spec, config, site.device_box, dense_bytes(file, spec, config))
    client = EngineClient(CLIENT, config.ctx_size)
    engine = RunningEngine(client, plan, {})
    try:
        _spawn_all(engine, config, site, spawn)
        _join_all(engine, _fabric_spec(spec, config, site), config, site)
        _open_all(engine, file, spec, config, site)
        _start_all(engine, spec, config, site)
        _await_fill(engine, on_progress)
    except BaseException:
        engine.stop()
        raise
    return engine


def _spawn_all(engine: RunningEngine, config: EngineConfig, site: Site, spawn: Spawn) -> None:
    role = "layers" if config.hosts_layers else "gpu"
    engine.handles[DRIVER] = spawn("driver", DRIVER, 0)
    for box in range(len(site.boxes)):
        engine.handles[storage_name(box)] = spawn("storage", storage_name(box), box)
    for device, box in enumerate(site.device_box):
        engine.handles[device_name(device)] = spawn(role, device_name(device), box)


def _fabric_spec(spec: ModelSpec, config: EngineConfig, site: Site) -> FabricSpec:
    peers = [CLIENT, *(storage_name(b) for b in range(len(site.boxes)))]
    peers += [device_name(d) for d in range(len(site.device_box))]
    return FabricSpec(
        processes=(DRIVER, *peers),
        rings=tuple(ring for peer in peers for ring in ((DRIVER, peer), (peer, DRIVER))),
        arenas=_arenas(spec, config),
    )


def _arenas(spec: ModelSpec, config: EngineConfig) -> tuple[tuple[str, int], ...]:
    if config.hosts_layers:
        return tuple((each.arena, each.layout.nbytes) for each in neighbours(config, spec))
    layout = StepArena(config.prefill_chunk, spec.hidden, spec.moe.top_k, spec.moe.n_experts)
    return tuple((arena_name(d), layout.nbytes) for d in range(len(config.devices)))


def _join_all(engine: RunningEngine, fabric: FabricSpec, config: EngineConfig, site: Site) -> None:
    """Join every process to its box's fabric, creators first, and connect them all."""
    plain, transport = fabric.to_dict(), config.transport
    endpoints: list[dict[str, Any]] = []
    for box, where in enumerate(site.boxes):
        names = [storage_name(box)]
        names += [device_name(d) for d, b in enumerate(site.device_box) if b == box]
        for name in [DRIVER, *names] if box == 0 else names:
            args = (plain, where.name, endpoints, where.host, transport)
            joined = _results([engine.handles[name].call("join", *args)], _CALL_S)
            endpoints = [*endpoints, *joined]
        if box == 0:
            args = (plain, where.name, endpoints, where.host, transport)
            endpoints = [*endpoints, engine.client.join(*args)]
    calls = [handle.call("connect", endpoints) for handle in engine.handles.values()]
    engine.client.connect(endpoints)
    _results(calls, _CALL_S)


def _open_all(
    engine: RunningEngine, file: GGUFFile, spec: ModelSpec, config: EngineConfig, site: Site
) -> None:
    """Reserve segments, map them in the devices, read the dense weights in the driver."""
    threads = config.threads or site.cores
    driver = engine.handles[DRIVER].call("open", config.to_dict(), list(site.device_box), threads)
    segments = []
    for box in range(len(site.boxes)):
        plan = _storage_plan(engine.plan, file, config, box)
        if box == ARM_NODE and has_arm(config, engine.plan):
            plan = replace(plan, arm=arm_plan(config, spec, site.cores))
        segments.append(engine.handles[storage_name(box)].call("open", plan))
    handles = _results(segments, _LOAD_S)
    calls = []
    for device, box in enumerate(site.device_box):
        handle = engine.handles[device_name(device)]
        if config.hosts_layers:
            held = engine.plan
            layers = LayerPlan(config.to_dict(), device, site.device_box, held.vram_slots(device),
                               held.gpu_segment(box).n_slots)  # fmt: skip
            calls.append(handle.call("open", layers, handles[box]))
        else:
            n_slots = engine.plan.segment_slots(box).n_slots
            experts = _device_plan(engine.plan, spec, config, device, (n_slots, threads))
            calls.append(handle.call("open", experts, handles[box]))
    _results(calls, _LOAD_S if config.hosts_layers else _CALL_S)
    _results([driver], _LOAD_S)


def _storage_plan(plan: EnginePlan, file: GGUFFile, config: EngineConfig, box: int) -> StoragePlan:
    """Return what a box's storage holds."""
    shards, table = tuple(str(p) for p in file.shards), plan.table.to_dict()
    held = plan.gpu_segment(box) if config.hosts_layers else plan.segment_slots(box)
    return StoragePlan(shards, table, held.n_slots, held.nbytes, config.read_threads)


def _device_plan(
    plan: EnginePlan, spec: ModelSpec, config: EngineConfig, device: int, room: tuple[int, int]
) -> DevicePlan:
    n_slots, threads = room
    return DevicePlan(
        device=local_name(config.devices[device]), arena=arena_name(device),
        table=plan.table.to_dict(), n_slots=n_slots, n_layers=spec.n_layers,
        n_experts=spec.moe.n_experts, top_k=spec.moe.top_k, hidden=spec.hidden,
        width=spec.moe.expert_width, max_tokens=config.prefill_chunk, threads=threads,
        int8=config.activations == "int8",
    )  # fmt: skip


def _start_all(engine: RunningEngine, spec: ModelSpec, config: EngineConfig, site: Site) -> None:
    bells = tuple(device_name(d) for d in range(len(site.device_box)))
    calls = [engine.handles[storage_name(b)].call("start", bells) for b in range(len(site.boxes))]
    calls += [engine.handles[name].call("start") for name in bells]
    _results(calls, _LOAD_S)
    arm = _arm_table(engine, spec, config)
    _results([engine.handles[DRIVER].call("start", arm)], _CALL_S)
    engine.client.start()


def _arm_table(engine: RunningEngine, spec: ModelSpec, config: EngineConfig) -> tuple[int, ...]:
    """Return how many of a token's experts in RAM storage computes, for 0, 1, 2 .. of them.

    Costs are measured one after the other, before anything else uses memory and link.

    Raises:
        ConfigError: the table that was given is one of another model.
    """
    top_k = spec.moe.top_k
    table = fixed_table(config.cpu_arm, top_k)
    if not has_arm(config, engine.plan):
        return ()
    if table is not None:
        return table
    costs = []
    for device in range(len(config.devices)):
        calls = [engine.handles[device_name(device)].call("arm_costs")]
        costs.append(_results(calls, _CALL_S)[0])
    copy_s, gpu_s = (max(column) for column in zip(*costs, strict=True))
    cpu_s = _results([engine.handles[storage_name(ARM_NODE)].call("arm_cost")], _CALL_S)[0]
    return arm_table(ArmCosts(copy_s, gpu_s, cpu_s), top_k)


def _await_fill(engine: RunningEngine, on_progress: Callable[[float, str], None] | None) -> None:
    """Wait until the tiers are filled; the driver bounds a stall, so this ends."""
    while True:
        done = float(_results([engine.handles[DRIVER].call("progress")], _CALL_S)[0])
        engine.client.report(EngineStatus(state="loading", load_progress=done))
        if on_progress is not None:
            on_progress(done, "loading experts")
        if done >= 1.0:
            engine.client.report(EngineStatus(state="ready"))
            return
        if engine.client.status().state == "degraded":
            _results([engine.handles[DRIVER].call("progress")], _CALL_S)  # raises why, if it can
            raise EngineError(engine.client.status().detail)
        time.sleep(0.02)


def _results(calls: list[Future[Any]], timeout_s: float) -> list[Any]:
    """Return all results; the first exception is raised after every call has ended.

    Raises:
        EngineError: an actor has not answered in time.
    """
    deadline = time.monotonic() + timeout_s
    try:
        errors = [call.exception(max(0.1, deadline - time.monotonic())) for call in calls]
    except FutureTimeoutError:
        raise EngineError(
            f"an actor has not answered within {timeout_s:g} s; its log says how far it came"
        ) from None
    for error in errors:
        if error is not None:
            cause = getattr(error, "cause", None)  # of Ray's, whose own text is the actor's stack
            raise cause if isinstance(cause, FomoeError) else error
    return [call.result(0) for call in calls]


class ThreadHandle:
    """An actor as a plain object in this process, its calls on one thread: for tests and tools."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._calls = ThreadPoolExecutor(max_workers=1)

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method on the actor's thread."""
        return self._calls.submit(getattr(self.actor, method), *args)

    def kill(self) -> None:
        """End the thread that takes calls."""
        self._calls.shutdown(wait=False)
