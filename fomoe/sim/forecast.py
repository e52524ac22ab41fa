"""What a model would do on a machine: what fits, how fast it is, what binds, what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fomoe.errors import BudgetError
from fomoe.sim.calibration import read_calibration
from fomoe.sim.decode import decode
from fomoe.sim.loads import (
    Cache,
    Loads,
    Replay,
    Rule,
    exact_ids,
    replay_ids,
    replay_loads,
    synthetic_scores,
)
from fomoe.sim.machine import Machine
from fomoe.sim.prompt import Spread, prompt_time
from fomoe.sim.schedule import Outcome, Schedule
from fomoe.sim.shapes import ModelShape

WARMUP = 150  # tokens of a trace that only fill the tiers
TOKENS, SAMPLED_LAYERS = 200, 6
_SWEEP = 1.15  # a prompt's time over its bound: measured 1.04 to 1.13 (docs/log.md)


@dataclass(frozen=True, slots=True)
class Span:
    """A prediction: the middle, and what the unknown leaves open."""

    low: float
    mid: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Span:
        """Return the span of what the three corners say; a good corner may give less."""
        _, mid, _ = figures
        return cls(min(figures), mid, max(figures))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """One reading of what is not known, from bad to good.

    Attributes:
        recall: share of misses that are guessed a layer ahead. Others measured 0.08 to 0.47 on
            misses (deepstrix) and 0.82 to 0.88 on all picks (FOMOE).
        drive: times the rated rate.
        kernels: times the devices' rates.
        software: times the engine's own time.
        slots: times the slots, for hit rates: texts differ.
    """

    recall: float
    drive: float
    kernels: float
    software: float
    slots: float


def corners(machine: Machine) -> tuple[Corner, Corner, Corner]:
    """Return the bad, the middle and the good corner; a measured machine's are narrower."""
    if machine.is_measured:
        return (
            Corner(recall=0.1, drive=0.93, kernels=0.95, software=1.2, slots=0.9),
            Corner(recall=0.5, drive=1.0, kernels=1.0, software=1.0, slots=1.0),
            Corner(recall=0.85, drive=1.07, kernels=1.05, software=0.8, slots=1.1),
        )
    share = read_calibration().fitted.drive_share
    return (
        Corner(recall=0.1, drive=0.9 * share, kernels=0.87, software=2.0, slots=0.85),
        Corner(recall=0.5, drive=share, kernels=1.0, software=1.0, slots=1.0),
        Corner(recall=0.85, drive=1.0, kernels=1.1, software=0.5, slots=1.15),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Where a model's bytes go.

    Attributes:
        device_slots, ram_slots: experts of a layer.
        device_bytes: of all devices, as used: dense weights, state, experts.
        device_total: of all devices, less what is reserved.
        ram_bytes, ram_total: the same of the nodes' memory.
        kv_bytes: per 1,000 tokens of context.
    """

    device_slots: float
    ram_slots: float
    device_bytes: float
    device_total: float
    ram_bytes: float
    ram_total: float
    kv_bytes: float


def fit_model(
    machine: Machine, shape: ModelShape, context: int,
    *, device_budget: float | None = None, ram_budget: float | None = None,
) -> Fit:  # fmt: skip
    """Share out memory: dense weights and state first, experts get the rest.

    Args:
        machine: what it runs on.
        shape: the model.
        context: tokens of the longest sequence.
        device_budget: bytes for experts on each device; all that is left if None.
        ram_budget: bytes for experts in each node's RAM; all that is left if None.

    Raises:
        BudgetError: the dense part and the experts of one layer do not fit.
    """
    device, host, n = machine.device, machine.host, machine.n_devices
    ram_total = machine.nodes * (host.ram_bytes - host.reserved_bytes)
    own = device.memory_bytes > 0
    total = n * (device.memory_bytes - device.reserved_bytes) if own else ram_total
    dense = shape.dense_bytes + shape.kv_bytes * context + shape.state_bytes
    per_layer = float(shape.slot_bytes.sum())
    room = total - dense if device_budget is None else min(total - dense, n * device_budget)
    least = shape.top_k * float(shape.slot_bytes.max()) * n
    if room < least:
        what = f"{machine.name}: dense weights, {context:,} tokens of state, one layer's experts"
        raise BudgetError(what, int(dense + least), int(total))
    slots = min(float(shape.n_experts), room / per_layer)
    spare = ram_total if own else ram_total - dense - slots * per_layer
    spare = max(0.0, spare if own or device_budget is not None else 0.0)
    in_ram = spare if ram_budget is None else min(spare, machine.nodes * ram_budget)
    ram_slots = min(shape.n_experts - slots, in_ram / per_layer) if own or ram_budget else 0.0
    used = dense + slots * per_layer
    return Fit(
        device_slots=slots, ram_slots=ram_slots, device_bytes=used, device_total=total,
        ram_bytes=ram_slots * per_layer + (0.0 if own else used), ram_total=ram_total,
        kv_bytes=1000 * shape.kv_bytes,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of the twin besides machine and model.

    `rule` decides on experts, None for the exact ones; budgets are as in `fit_model`.
    """

    context: int = 4096
    rule: Rule | None = None
    device_budget: float | None = None
    ram_budget: float | None = None
    schedule: Schedule = field(default_factory=Schedule)


class Twin:
    """Answers about one model; traces are made once and shared by all machines.

    Args:
        shape: the model.
        question: what is asked.
        scores: router scores of a text, float32 [T, L', E], of which the first `WARMUP` tokens only
            fill the tiers; synthesised if None.
    """

    def __init__(
        self, shape: ModelShape, question: Question,
        scores: npt.NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.question = shape, question
        if scores is not None:
            vars(self)["_scores"] = scores
        self._loads: dict[tuple[float, float, int], Loads] = {}
        self._outcomes: dict[tuple[Machine, Corner], Outcome] = {}

    @cached_property
    def _scores(self) -> npt.NDArray[np.float32]:
        layers = min(SAMPLED_LAYERS, self.shape.n_layers)
        return synthetic_scores(TOKENS, layers, self.shape.n_experts, seed=0)

    @cached_property
    def exact(self) -> npt.NDArray[np.int32]:
        """The experts that the exact router wants, int32 [T, L', k]; the first fill the tiers."""
        return exact_ids(self._scores, self.shape.top_k)

    @cached_property
    def _spread(self) -> Spread:
        return Spread.of(self._scores, self.shape.top_k)

    def share_traces(self, other: Twin) -> None:
        """Take the traces of another twin of the same model."""
        for name in ("_scores", "_spread", "exact"):
            if name in vars(other):
                vars(self)[name] = vars(other)[name]

    def fit(self, machine: Machine) -> Fit:
        """Return what fits on the machine."""
        q = self.question
        return fit_model(machine, self.shape, q.context, device_budget=q.device_budget,
                         ram_budget=q.ram_budget)  # fmt: skip

    def loads(self, machine: Machine, fit: Fit, slots: float = 1.0) -> Loads:
        """Return what layers ask for, with so many times the slots."""
        on_device, in_ram = self._resident(fit, slots)
        owners = machine.n_devices if self.question.schedule.split == "experts" else 1
        key = on_device, in_ram, owners
        if key not in self._loads:
            rule = self.question.rule
            replay = Replay(top_k=self.shape.top_k, warmup=WARMUP, devices=owners,
                            layers=self.shape.n_layers)  # fmt: skip
            cache = Cache(device_slots=on_device, ram_slots=in_ram)
            if rule is not None:
                found = replay_loads(self._scores, cache, rule, replay)
            else:
                found = replay_ids(self.exact, self.shape.n_experts, cache, replay)
            self._loads[key] = found
        return self._loads[key]

    def _resident(self, fit: Fit, slots: float) -> tuple[float, float]:
        """Return a layer's experts on devices and in RAM; what holds all of them always does."""
        most = float(self.shape.n_experts)
        if fit.device_slots + fit.ram_slots >= most:
            return fit.device_slots, fit.ram_slots
        on_device = min(most, fit.device_slots * slots)
        return on_device, min(most - on_device, fit.ram_slots * slots)

    def outcome(self, machine: Machine, corner: Corner) -> Outcome:
        """Simulate decoding in one corner."""
        key = machine, corner
        if key not in self._outcomes:
            loads = self.loads(machine, self.fit(machine), corner.slots)
            schedule = replace(self.question.schedule, recall=corner.recall)
            self._outcomes[key] = decode(in_corner(machine, corner), self.shape, loads, schedule,
                                         context=self.question.context // 2)  # fmt: skip
        return self._outcomes[key]

    def speed(self, machine: Machine) -> Span:
        """Predict tokens per second."""
        return Span.of([self.outcome(machine, c).tokens_per_s for c in corners(machine)])

    def prompt(self, machine: Machine, tokens: int) -> Span:
        """Predict seconds to the first token after a prompt."""
        fit, times = self.fit(machine), []
        for corner in corners(machine):
            box, resident = in_corner(machine, corner), self._resident(fit, corner.slots)
            times.append(prompt_time(box, self.shape, self._spread, tokens, resident).seconds)
        bad, mid, good = times
        return Span.of((bad * _SWEEP, mid * (1 + _SWEEP) / 2, good))

    def upgrade(self, machine: Machine, better: Machine) -> Span:
        """Predict the tokens per second that another machine has more, on the same text."""
        gains = []
        for corner in corners(machine):
            same = replace(corner, slots=1.0)
            before, after = self.outcome(machine, same), self.outcome(better, same)
            gains.append(after.tokens_per_s - before.tokens_per_s)
        return Span.of(gains)


def in_corner(machine: Machine, corner: Corner) -> Machine:
    """Return the machine as a corner reads it."""
    device, soft = machine.device, machine.software
    return replace(
        machine,
        devices=(replace(device, dense_rate=device.dense_rate * corner.kernels,
                         expert_rate=device.expert_rate * corner.kernels,
                         matrix_rate=device.matrix_rate * corner.kernels),),
        drives=tuple(replace(d, rate=d.rate * corner.drive) for d in machine.drives),
        software=replace(soft, layer_s=soft.layer_s * corner.software,
                         handoff_s=soft.handoff_s * corner.software,
                         token_s=soft.token_s * corner.software,
                         reads_s=soft.reads_s * corner.software),
    )  # fmt: skip


def upgrades(machine: Machine) -> dict[str, Machine]:
    """Return what one could buy, by name: a second drive, memory, another device."""
    host, device, drives = machine.host, machine.device, machine.drives
    more = 32 * 2.0**30
    bought = {
        "a second drive like the first" if len(machine.drive_rates) == 1 else "one more drive":
            replace(machine, drives=(replace(drives[0], count=drives[0].count + 1), *drives[1:])),
        "32 GB more RAM": replace(machine, host=replace(host, ram_bytes=host.ram_bytes + more)),
    }  # fmt: skip
    if device.memory_bytes:
        bought["one more GPU of the kind"] = replace(
            machine, devices=(replace(device, count=device.count + 1),)
        )
    return bought
