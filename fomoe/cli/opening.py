"""Opens a model as the options say and shows how far loading has come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fomoe.cli.options import EngineOptions, ModelOptions
from fomoe.config import RoutingConfig
from fomoe.devices import is_gpu
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.quality import read_sensitivities

if TYPE_CHECKING:
    from fomoe.llm import LLM

# What the bundled model may hold of its experts, so that each tier has something to do.
DEMO_DEVICE_SHARE = 3
DEMO_RAM_SHARE = 6


def demo_budgets(table: ExpertTable, n_devices: int) -> tuple[int, int]:
    """Return (bytes per device, bytes of RAM): a third and a sixth of all expert slots."""
    slots = sum(each.slot_bytes * len(each.layers) for each in table.classes) * table.n_experts
    return slots // DEMO_DEVICE_SHARE // n_devices, slots // DEMO_RAM_SHARE


def llm_arguments(model: ModelOptions, engine: EngineOptions) -> dict[str, Any]:
    """Return the arguments of `LLM` for these options."""
    devices = model.device_names()
    vram_budget, ram_budget = model.vram_budget, model.ram_budget
    if model.is_demo and not model.has_budget and not is_gpu(devices[0]):
        table = ExpertTable.from_gguf(open_gguf(model.path))
        vram_budget, ram_budget = demo_budgets(table, len(devices))
    profile = engine.loss_profile
    return {
        "devices": list(devices),
        "attention": engine.attention,
        "vram_budget": vram_budget,
        "ram_budget": ram_budget,
        "routing": RoutingConfig(
            quality=engine.contract,
            car_capacity=engine.car_capacity,
            logical_eviction=engine.logical_eviction,
            backfill=engine.backfill,
            warmup=engine.warmup,
            shadow_every=engine.shadow_every,
            sensitivities=() if profile is None else read_sensitivities(profile),
        ),
        "profile": engine.profile,
        "ctx_size": engine.ctx_size,
        "threads": engine.threads,
        "kv_dtype": engine.kv_dtype,
        "activations": engine.activations,
        "ram_policy": engine.ram_policy,
        "prefetch": engine.prefetch,
        "prefetch_depth": engine.prefetch_depth,
        "prefetch_budget": engine.prefetch_budget,
        "cpu_arm": engine.cpu_arm,
        "overlap": engine.overlap,
        "prefill_chunk": engine.prefill_chunk,
        "transport": engine.transport,
        "address": engine.address,
    }


@contextmanager
def opened(model: ModelOptions, engine: EngineOptions, **more: Any) -> Iterator[LLM]:
    """Start the actors, load the model with a progress bar on stderr, stop them at the end."""
    # Imported here because Ray takes a second, which `fomoe --help` and `fomoe show` can spare.
    from fomoe.llm import LLM

    arguments = llm_arguments(model, engine)
    with progress_bar() as progress:
        task = progress.add_task("starting Ray", total=1.0)
        llm = LLM(
            model.path,
            **arguments,
            **more,
            on_progress=lambda share, what: progress.update(
                task, completed=share, description=what
            ),
        )
    with llm:
        yield llm


def progress_bar() -> Progress:
    """Return a bar on stderr that leaves no trace; nothing is drawn where nobody looks."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
