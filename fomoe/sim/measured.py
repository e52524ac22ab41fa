"""Writes a machine's file from what `fomoe bench` measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fomoe.errors import ConfigError

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
        drive_rate, drive_latency_s: of reads of one expert's parts, four and one under way.
        layer_s: decisions and messages of a layer.
        token_s: sampling, events.
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
            "rate": (m.drive_rate, f"direct reads of experts' parts, 4 under way, {by}"),
            "latency_s": (m.drive_latency_s, f"one under way, less its bytes at the rate, {by}"),
        },
        "software": {
            "layer_s": (m.layer_s, f"`brain` and `channel` of a token over its layers, {by}"),
            "token_s": (m.token_s, f"`rest` of a token, {by}"),
        },
    }  # fmt: skip
    lines = [f'title = "this machine, measured with {m.model}"', "is_measured = true"]
    for name, values in tables.items():
        plain = name.strip("[]")
        lines += ["", f"[{name}]"]
        if plain == "device":
            lines += [f"count = {m.devices}", "shares_cores = true"]
        lines += [f"{key} = {max(value, _LEAST):.6g}" for key, (value, _) in values.items()]
        lines += ["", f"[{plain}.source]"]
        lines += [f'{key} = "{reason}"' for key, (_, reason) in values.items()]
    return "\n".join(lines) + "\n"
