"""An engine whose actors are plain objects in this process: everything but Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fomoe.actors.driver import DriverActor
from fomoe.actors.gpu import GPUActor
from fomoe.actors.launch import Box, Handle, RunningEngine, Site, ThreadHandle, launch
from fomoe.actors.layers import LayerActor
from fomoe.actors.storage import StorageActor
from fomoe.config import Budgets, EngineConfig
from fomoe.engine.plan import resolve
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.storage.fetch import Fetch

_CLASSES = {
    "driver": DriverActor, "gpu": GPUActor, "layers": LayerActor, "storage": StorageActor,
}  # fmt: skip


class DelayedStorage(StorageActor):
    """Storage whose reads take as long as `delay` says."""

    delay: Callable[[Fetch], float]

    def open(self, plan: Any, delay: Any = None) -> Any:
        return super().open(plan, self.delay)


@contextmanager
def local_engine(
    path: Path,
    *,
    devices: tuple[str, ...] = ("cpu",),
    device_box: tuple[int, ...] | None = None,
    vram: int | None = None,
    ram: int | None = None,
    delay: Callable[[Fetch], float] | None = None,
    free_bytes: int = 1 << 34,
    **options: Any,
) -> Iterator[RunningEngine]:
    """Start an engine of thread actors over `path`; budgets in bytes, per device and per box."""
    file = open_gguf(path)
    spec = read_spec(file)
    config = EngineConfig(
        model=path, devices=devices, budgets=Budgets(vram_bytes=vram, ram_bytes=ram), **options
    )
    table = ExpertTable.from_gguf(file, spec.n_layers)
    config = resolve(config, table, spec, free_bytes)
    where = device_box or (0,) * len(devices)
    boxes = tuple(Box(f"box-{b}", "127.0.0.1") for b in range(max(where) + 1))

    def spawn(role: str, name: str, box: int) -> Handle:
        del box
        if role == "storage" and delay is not None:
            storage = DelayedStorage(name)
            storage.delay = delay
            return ThreadHandle(storage)
        return ThreadHandle(_CLASSES[role](name))

    site = Site(boxes, where, 1)
    engine = launch(file, spec, replace(config, threads=1), site, spawn)
    try:
        yield engine
    finally:
        engine.stop()


def slot_bytes(path: Path) -> tuple[int, int]:
    """Return (bytes of one expert slot summed over all experts, number of experts) of a model."""
    file = open_gguf(path)
    spec = read_spec(file)
    table = ExpertTable.from_gguf(file, spec.n_layers)
    total = sum(table.slot_bytes(i) for i in range(spec.n_layers)) * spec.moe.n_experts
    return total, spec.n_layers * spec.moe.n_experts


def own_threads() -> int:
    """Return how many threads this process has."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())
