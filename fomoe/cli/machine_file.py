"""`fomoe bench --machine FILE`: the figures of two runs as a machine for `fomoe plan`."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from fomoe.cli.options import ModelOptions
from fomoe.cli.output import check_output, writing
from fomoe.devices import is_gpu
from fomoe.errors import ConfigError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.sim.loads import assumed_loads
from fomoe.sim.measured import Measurements, machine_toml, solve_read_time
from fomoe.sim.shapes import ModelShape, shape_of_file
from fomoe.storage.rates import expert_read_times
from fomoe.storage.reader import DirectReader

_TOKENS = 200  # of the loads that stand for the limited run


def part_of(model: ModelOptions, parts: int) -> ModelOptions:
    """Return the options with device slots for all experts over `parts`, and no RAM tier."""
    table = ExpertTable.from_gguf(open_gguf(model.path))
    slots = sum(each.slot_bytes * len(each.layers) for each in table.classes) * table.n_experts
    return replace(model, vram_budget=slots // parts // len(model.device_names()), ram_budget=0)


def check_target(
    path: Path, generate: int, devices: Sequence[str] = ("cpu",), *, is_exact: bool = True
) -> None:
    """Refuse, before anything is measured, what could not be written or would not be true.

    Raises:
        ConfigError: devices are GPUs, no tokens are generated, experts are substituted, or the file
            cannot be there.
    """
    if not is_exact:
        raise ConfigError("--machine measures exact runs: leave --quality and --car out")
    if any(map(is_gpu, devices)):
        raise ConfigError(
            f"--machine measures cpu devices, not {', '.join(devices)}; write the file of a "
            "machine with GPUs by hand, as those in deploy/machines"
        )
    if not generate:
        raise ConfigError("--machine measures decoding too: generate tokens (-n 64)")
    check_output(path, "--machine")


def write_machine(
    path: Path, model: Path, figures: tuple[dict[str, Any], dict[str, Any]], free_bytes: float
) -> None:
    """Measure the drive and write the machine's file.

    Args:
        path: where to.
        model: what was run.
        figures: of a run that held all experts, and of one that held half of them, as
            `fomoe bench --json` prints them.
        free_bytes: memory that was free before.

    Raises:
        ConfigError: a run is not what is needed, or the file cannot be written.
    """
    file = open_gguf(model)
    with DirectReader(file.shards, ExpertTable.from_gguf(file)) as reader:
        reads = expert_read_times(reader)
    text = machine_toml(measurements(figures, shape_of_file(model), reads, free_bytes))
    with writing(path):
        path.write_text(text)


def measurements(
    figures: tuple[dict[str, Any], dict[str, Any] | None], shape: ModelShape,
    reads: tuple[float, float], free_bytes: float,
) -> Measurements:  # fmt: skip
    """Turn the figures of `fomoe bench` into a machine's; see `write_machine`.

    Without a second run, or where that read nothing, reading costs nothing but the drive's time.
    """
    full, limited = figures
    decode, prompt = full.get("decode"), full["prefill"]
    if decode is None or decode["hits"]["nvme"] or prompt["hits"]["nvme"]:
        raise ConfigError(
            "--machine measures kernels first: generate tokens (-n 64) with budgets that hold all "
            "experts, or take a smaller model"
        )
    ms, (each, on_top) = decode["parts_ms"], reads
    macs = (shape.dense_macs + shape.expert_macs) * prompt["tokens"]
    found = Measurements(
        model=Path(full["model"]).name,
        day=datetime.date.today().isoformat(),
        devices=len(full["devices"]),
        ram_bytes=float(psutil.virtual_memory().total),
        free_bytes=free_bytes,
        memory_rate=full["rates"]["memory"],
        dense_rate=shape.dense_bytes / (ms["dense"] * 1e-3),
        expert_rate=shape.token_expert_bytes / (ms["experts"] * 1e-3),
        matrix_rate=macs / (sum(prompt["parts_ms"].values()) * 1e-3),
        drive_rate=float(shape.expert_bytes.mean()) / each,
        drive_latency_s=on_top,
        layer_s=(ms["brain"] + ms["channel"]) * 1e-3 / shape.n_layers,
        token_s=ms["rest"] * 1e-3,
    )
    hits = {} if limited is None else limited["decode"]["hits"]
    if limited is None or not hits["nvme"]:
        return found
    total = sum(hits.values())
    shares = hits["device"] / total, hits["ram"] / total, hits["nvme"] / total
    loads = assumed_loads(shares, shape.top_k, shape.n_layers, _TOKENS, seed=0)
    speed = limited["decode"]["tokens_per_s"]["median"]
    return replace(found, reads_s=solve_read_time(found, shape, loads, speed))
