"""How long a prompt takes: chunks sweep through the layers, each expert passes by once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.sim.machine import Machine
from fomoe.sim.shapes import ModelShape

_CHUNK = 4096  # `engine.chunk.MOST_CHUNK`


@dataclass(frozen=True, slots=True)
class Spread:
    """How many distinct experts of a layer a text wants: E (1 - exp(-a T^b)) after T tokens."""

    n_experts: int
    a: float
    b: float

    @classmethod
    def of(cls, scores: npt.NDArray[np.float32], top_k: int) -> Spread:
        """Fit to scores float32 [T, L, E], at a quarter of the tokens and at all of them."""
        n_tokens, n_layers, n_experts = scores.shape
        ids = np.argpartition(scores, -top_k, axis=2)[:, :, -top_k:]
        points = []
        for count in (max(2, n_tokens // 4), n_tokens):
            distinct = [len(np.unique(ids[:count, layer])) for layer in range(n_layers)]
            missing = max(1 - float(np.mean(distinct)) / n_experts, 1e-6)
            points.append((math.log(count), math.log(-math.log(missing))))
        (x0, y0), (x1, y1) = points
        b = (y1 - y0) / (x1 - x0)
        return cls(n_experts, math.exp(y1 - b * x1), b)

    def distinct(self, tokens: int) -> float:
        """Return how many experts `tokens` tokens want."""
        return self.n_experts * -math.expm1(-self.a * tokens**self.b)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTime:
    """Seconds until the first token, and of each resource alone."""

    seconds: float
    drive: float
    link: float
    device: float

    @property
    def binds(self) -> str:
        """The slowest resource."""
        parts = {"drive": self.drive, "link": self.link, "device": self.device}
        return max(parts, key=lambda name: parts[name])


def prompt_time(
    machine: Machine, shape: ModelShape, spread: Spread, tokens: int,
    resident: tuple[float, float],
) -> PromptTime:  # fmt: skip
    """Predict the time of a prompt whose reads, copies and arithmetic overlap.

    Of the experts that a chunk wants, each tier has its share of the layer's: what no tier holds is
    read, what no device holds is copied. The first layer's reads or copies are not hidden.

    Args:
        machine: what it runs on.
        shape: the model.
        spread: how many experts a chunk wants.
        tokens: of the prompt.
        resident: experts of a layer on devices, and in RAM.
    """
    device = machine.device
    drive_s = link_s = 0.0
    chunks = -(-tokens // _CHUNK)
    copied = max(0.0, 1 - resident[0] / shape.n_experts)
    read = max(0.0, 1 - sum(resident) / shape.n_experts)
    for chunk in range(chunks):
        wanted = spread.distinct(min(_CHUNK, tokens - chunk * _CHUNK))
        nbytes = wanted * float(shape.expert_bytes.sum())
        drive_s += read * nbytes / (machine.nodes * sum(machine.drive_rates))
        if device.link_rate:
            link_s += copied * nbytes / (device.link_rate * machine.n_devices)
    macs = shape.dense_macs + shape.expert_macs
    device_s = tokens * macs / device.matrix_rate + shape.head_bytes / device.dense_rate
    steps = chunks * shape.n_layers * machine.software.layer_s
    fill = max(drive_s, link_s) / chunks / shape.n_layers
    longest = max(drive_s, link_s, device_s)
    return PromptTime(seconds=longest + fill + steps, drive=drive_s, link=link_s, device=device_s)
