"""Which layers each device hosts, and what they need of its memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fomoe.config import EngineConfig
from fomoe.devices import local_name
from fomoe.errors import ConfigError
from fomoe.gguf.reader import GGUFFile
from fomoe.kernels.gpu.probe import free_memory
from fomoe.model.gpu.options import HostOptions
from fomoe.model.spec import ModelSpec

# What amdgpu lets all processes together pin: 63/64 of the memory less 1.5 GiB, by
# amdgpu_amdkfd_gpuvm.c of Linux 6.5 and later; and the switch that lifts it.
_AMD_KEEPS, _AMD_RESERVE_BYTES = 64, 3 << 29
_AMD_UNLIMITED = Path("/sys/module/amdgpu/parameters/no_system_mem_limit")
_PINNED_BESIDE_BYTES = 256 << 20  # by each process: arenas, mirrors


def n_states(config: EngineConfig) -> int:
    """Return how many sequences' states devices hold: shadow steps take a second one."""
    routing = config.routing
    return 2 if routing.shadow_every or routing.quality.kind == "kl" else 1


def looks_ahead(config: EngineConfig) -> bool:
    """Return whether devices say what the next layer may want, so that it can be brought."""
    return config.prefetch and config.prefetch_depth > 0 and config.prefetch_budget > 0


def host_options(config: EngineConfig, spec: ModelSpec) -> tuple[HostOptions, ...]:
    """Return what each device's actor hosts; layer l lives on device l mod n.

    The embedding is beside the first layer, the head beside the last. Equal in every process.
    """
    whole = _options(config, spec)
    if not config.splits_layers:
        return whole
    experts: dict[str, Any] = {"part": "experts", "embedding": False, "head": False, "ahead": False}
    return tuple(replace(each, **experts) for each in whole)


def driver_options(config: EngineConfig, spec: ModelSpec) -> tuple[HostOptions, ...]:
    """Return what the driver's process hosts on each device, beside the actor with its experts."""
    if not config.splits_layers:
        return ()
    return tuple(replace(each, part="dense") for each in _options(config, spec))


def _options(config: EngineConfig, spec: ModelSpec) -> tuple[HostOptions, ...]:
    n = len(config.devices)
    last = (spec.n_layers - 1) % n
    return tuple(
        HostOptions(
            layers=tuple(range(device, spec.n_layers, n)),
            ctx_size=config.ctx_size,
            kv_dtype=config.kv_dtype,
            int8=config.activations == "int8",
            max_tokens=config.prefill_chunk,
            n_states=n_states(config),
            embedding=device == 0,
            head=device == last,
            ahead=looks_ahead(config),
            arm=config.cpu_arm != "off",
        )
        for device in range(n)
    )


def dense_bytes(file: GGUFFile, spec: ModelSpec, config: EngineConfig) -> tuple[int, ...]:
    """Return the bytes that each device needs before any expert; none where none hosts layers.

    Where the driver's process has a part of each device, they are those of both processes.
    """
    if not config.hosts_layers:
        return ()
    needed = [planned_bytes(file, spec, each) for each in host_options(config, spec)]
    for device, options in enumerate(driver_options(config, spec)):
        needed[device] += planned_bytes(file, spec, options)
    return tuple(needed)


def planned_bytes(file: GGUFFile, spec: ModelSpec, options: HostOptions) -> int:
    """Return what a device needs for weights, states and work; no device is asked."""
    from fomoe.model.gpu import planning  # kernels' builders, which CPU machines can spare

    return planning.planned_bytes(file, spec, options)


def free_vram(config: EngineConfig) -> tuple[int, ...]:
    """Return the free memory of each GPU, found out before anything starts; none of `cpu`.

    Raises:
        DeviceError: a device of this machine, or its driver, is not there.
        ConfigError: a GPU of another node has no budget.
    """
    if not config.hosts_layers:
        return ()
    here = [name for name in config.devices if local_name(name) == name]
    free = dict(zip(here, free_memory(here), strict=True)) if here else {}
    if len(here) == len(config.devices):
        return tuple(free[name] for name in config.devices)
    if config.budgets.vram_bytes is None:
        raise ConfigError(
            "the memory of a GPU of another node is not known here; give --vram-budget"
        )
    return ()


def most_pinned(config: EngineConfig) -> int | None:
    """Return the largest RAM tier that this machine's GPUs can pin; None where nothing bounds it.

    Each device's process pins all of the tier. amdgpu counts it once for each of them.
    """
    processes = sum(name.startswith("hip:") and local_name(name) == name for name in config.devices)
    if not processes:
        return None
    try:
        if _AMD_UNLIMITED.read_text().strip() in ("Y", "1"):
            return None
    except OSError:
        pass  # no such driver here: whoever opens the device will say so
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    pinnable = total - total // _AMD_KEEPS - _AMD_RESERVE_BYTES
    return max(0, pinnable // processes - _PINNED_BESIDE_BYTES)
