"""`fomoe bench --machine FILE`: the figures of a run as a machine for `fomoe plan`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.errors import ConfigError
from fomoe.gguf.extents import PAGE_BYTES, ExpertTable
from fomoe.gguf.reader import GGUFFile
from fomoe.model.spec import ModelSpec
from fomoe.sim.measured import Measurements, machine_toml
from fomoe.sim.shapes import shape_of
from fomoe.storage.rates import timed_reads

_READS = 400
_READ_S = 1.0
_DEPTH = 4  # as many as storage has threads


def expert_read_times(file: GGUFFile, table: ExpertTable) -> tuple[float, float]:
    """Measure direct reads of experts' parts in random order.

    Returns:
        Bytes per second with four under way, and the seconds by which one alone takes longer than
        its bytes would at that rate.
    """
    rng = np.random.default_rng(0)
    layers = rng.choice(np.array(table.layers), _READS)
    experts = rng.integers(0, table.n_experts, _READS)
    parts = [table.extents(int(a), int(b))[0] for a, b in zip(layers, experts, strict=True)]
    nbytes = -(-max(part.nbytes for part in parts) // PAGE_BYTES) * PAGE_BYTES
    shard = parts[0].shard
    last = file.shard_bytes[shard] - nbytes
    offsets = [
        min(part.offset, last) // PAGE_BYTES * PAGE_BYTES for part in parts if part.shard == shard
    ]
    path = file.shards[shard]
    rate = timed_reads(path, offsets, nbytes, _READ_S, _DEPTH)
    alone = timed_reads(path, offsets[::-1], nbytes, _READ_S, 1)
    return rate, max(0.0, nbytes / alone - nbytes / rate)


def measurements(
    figures: dict[str, Any], file: GGUFFile, spec: ModelSpec, memory: tuple[float, float]
) -> Measurements:
    """Turn the figures of `fomoe bench` into a machine's.

    Args:
        figures: as `fomoe bench --json` prints them.
        file: the model.
        spec: the model's specification.
        memory: total and free bytes before the model was loaded.

    Raises:
        ConfigError: experts were read during the run, or no token was generated.
    """
    decode = figures.get("decode")
    if decode is None or decode["hits"]["nvme"] or figures["prefill"]["hits"]["nvme"]:
        raise ConfigError(
            "--machine measures kernels: generate tokens (-n 64) with budgets that hold all experts"
        )
    shape = shape_of(file, spec)
    ms, prompt = decode["parts_ms"], figures["prefill"]
    macs = (shape.dense_macs + shape.expert_macs) * prompt["tokens"]
    rate, latency = expert_read_times(file, ExpertTable.from_gguf(file, spec.n_layers))
    return Measurements(
        model=Path(figures["model"]).name,
        day=datetime.date.today().isoformat(),
        devices=len(figures["devices"]),
        ram_bytes=memory[0],
        free_bytes=memory[1],
        memory_rate=figures["rates"]["memory"],
        dense_rate=shape.dense_bytes / (ms["dense"] * 1e-3),
        expert_rate=shape.token_expert_bytes / (ms["experts"] * 1e-3),
        matrix_rate=macs / (sum(prompt["parts_ms"].values()) * 1e-3),
        drive_rate=rate,
        drive_latency_s=latency,
        layer_s=(ms["brain"] + ms["channel"]) * 1e-3 / shape.n_layers,
        token_s=ms["rest"] * 1e-3,
    )


def write_machine(
    path: Path, figures: dict[str, Any], file: GGUFFile, spec: ModelSpec,
    memory: tuple[float, float],
) -> None:  # fmt: skip
    """Measure the drive and write the machine's file.

    Raises:
        ConfigError: the run cannot be one of a machine, or the file cannot be written.
    """
    text = machine_toml(measurements(figures, file, spec, memory))
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
