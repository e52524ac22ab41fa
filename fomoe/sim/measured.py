"""A machine from what `fomoe bench` measured, and its file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace

from fomoe.errors import ConfigError
from fomoe.sim.decode import decode
from fomoe.sim.loads import Loads
from fomoe.sim.machine import Device, Drive, Host, Machine, Software
from fomoe.sim.schedule import Schedule
from fomoe.sim.shapes import ModelShape

_HALVINGS = 16
_LEAST = 1e-9  # a time that was too short to be measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Figures of a run in which every expert was resident.

    Attributes:
        model: name of the file; kernel rates are of its shapes and quants.
        day: of the run.
        devices: emulated devices, which share the cores.
        ram_bytes, free_bytes: memory, and what of it was free.
        memory_rate: bytes per second that the cores read.
        dense_rate, expert_rate: bytes of weights per second of decoding.
        matrix_rate: multiply-adds per second of the prompt.
        drive_rate, drive_latency_s: of bursts of experts through storage's queue.
        layer_s: decisions and messages of a layer.
        token_s: sampling, events.
        reads_s: what a layer that reads takes longer than all of this explains.
    """

    model: str
    day: str
    devices: int
    ram_bytes: float
    free_bytes: float
    memory_rate: float
    dense_rate: float
    expert_rate: float
    matrix_rate: float
    drive_rate: float
    drive_latency_s: float
    layer_s: float
    token_s: float
    reads_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"{field.name} was measured as {value}: run `fomoe bench` with -n of 16 or "
                    "more, on a drive that allows direct reads, with budgets that hold all experts"
                )


def machine_toml(m: Measurements) -> str:
    """Return the text of the machine's file."""
    by = f"fomoe bench {m.model}, {m.day}"
    tables = {
        "host": {
            "ram_bytes": (m.ram_bytes, "the system's total"),
            "reserved_bytes": (
                m.ram_bytes - m.free_bytes, "what was not free before the model was loaded",
            ),
            "memory_rate": (m.memory_rate, f"a reading loop, {by}"),
            "cpu_rate": (m.expert_rate, f"as device.expert_rate, {by}"),
        },
        "[device]": {
            "dense_rate": (m.dense_rate, f"dense weights over the time of `dense`, {by}"),
            "expert_rate": (m.expert_rate, f"routed experts over the time of `experts`, {by}"),
            "matrix_rate": (m.matrix_rate, f"multiply-adds of the prompt over its time, {by}"),
        },
        "[drive]": {
            "rate": (m.drive_rate, "each more expert of a burst of four, through the fetch queue"),
            "latency_s": (m.drive_latency_s, "what a burst of one takes on top, likewise"),
        },
        "software": {
            "layer_s": (m.layer_s, f"`brain` and `channel` of a token over its layers, {by}"),
            "token_s": (m.token_s, f"`rest` of a token, {by}"),
            "reads_s": (
                m.reads_s, "what is left over of a run with slots for half of the experts",
            ),
        },
    }  # fmt: skip
    title = f"this machine, measured with {m.model}"
    lines = [f"title = {_quoted(title)}", "is_measured = true"]
    for name, values in tables.items():
        plain = name.strip("[]")
        lines += ["", f"[{name}]"]
        if plain == "device":
            lines += [f"count = {m.devices}", "shares_cores = true"]
        lines += [f"{key} = {max(value, _LEAST):.6g}" for key, (value, _) in values.items()]
        lines += ["", f"[{plain}.source]"]
        lines += [f"{key} = {_quoted(reason)}" for key, (_, reason) in values.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a TOML string; JSON's escapes are among TOML's."""
    return json.dumps(text, ensure_ascii=False)


def machine_of(m: Measurements) -> Machine:
    """Return the machine itself, without sources."""
    return Machine(
        name="measured", title=f"measured with {m.model}", nodes=1,
        host=Host(ram_bytes=m.ram_bytes, reserved_bytes=max(0.0, m.ram_bytes - m.free_bytes),
                  memory_rate=m.memory_rate, cpu_rate=m.expert_rate),
        devices=(Device(count=m.devices, dense_rate=m.dense_rate, expert_rate=m.expert_rate,
                        matrix_rate=m.matrix_rate, shares_cores=True),),
        drives=(Drive(rate=m.drive_rate, latency_s=m.drive_latency_s),),
        software=Software(layer_s=max(m.layer_s, _LEAST), token_s=m.token_s, reads_s=m.reads_s),
        network=None, sources={}, is_measured=True,
    )  # fmt: skip


def solve_read_time(m: Measurements, shape: ModelShape, loads: Loads, speed: float) -> float:
    """Return the `reads_s` with which the twin says `speed` tokens per second for the loads.

    0 where the twin is slower without it. Nothing is guessed ahead.
    """

    def seconds(reads_s: float) -> float:
        machine = machine_of(replace(m, reads_s=reads_s))
        return 1 / decode(machine, shape, loads, Schedule()).tokens_per_s

    low, high = 0.0, 1 / speed
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if seconds(middle) > 1 / speed else (middle, high)
    return low
