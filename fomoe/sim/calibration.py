"""The twin beside what the original was measured to do; two constants are fitted and frozen."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.errors import ConfigError
from fomoe.residency import LRU
from fomoe.residency.topology import RamPolicy
from fomoe.routing import CacheAwareRouting
from fomoe.sim.decode import decode
from fomoe.sim.lanes import F64
from fomoe.sim.loads import Cache, Loads, Replay, assumed_loads, replay_loads, synthetic_scores
from fomoe.sim.machine import Machine, find_machine
from fomoe.sim.schedule import Schedule
from fomoe.sim.shapes import ModelShape, shape_by_name
from fomoe.sim.tables import Part, load_toml, part_of

_FILE = Path(__file__).with_name("calibration.toml")
_MODEL = "397b-a17b"
_ORIGINAL = Schedule(together=True, pieces=1)
_TOKENS, _WARMUP, _SAMPLED_LAYERS = 300, 160, 6
_POLICIES: tuple[RamPolicy, ...] = ("inclusive", "exclusive")
_FIT_STEPS = 5
_EXACT = 1.01  # a threshold that never substitutes
RECALLS = (0.1, 0.85)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Part):
    """The two constants: a share of the drive's rated rate, and the second version's layer time."""

    drive_share: float
    layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Version(Part):
    """What one version's software and kernels took; 0 is as fitted, or as in the machine's file."""

    name: str
    layer_s: float = 0.0
    dense_ms: float = 0.0
    experts_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A measurement of the original.

    Attributes:
        role: fitted, predicted, or checked (no published hit rates).
        measured: tokens per second, lowest and highest.
        device, ram, substituted: published shares of activations; -1 if there are none.
        substitutes_in_ram: share of the substitutes; -1 if our rules have to say.
        car: threshold, 0 for exact.
        slots: per layer, device and RAM.
    """

    name: str
    role: str
    version: str
    machine: str
    measured: list[float]
    car: float
    slots: list[int]
    source: str
    device: float = -1.0
    ram: float = -1.0
    substituted: float = 0.0
    substitutes_in_ram: float = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The file: constants, versions by name, rows."""

    fitted: Fitted
    versions: dict[str, Version]
    rows: tuple[Row, ...]
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What the twin says of a row, tokens per second.

    Attributes:
        predicted: lowest, middle and highest over what the row leaves open: where substitutes
            lie. None where hit rates are not published.
        replayed: the same with the loads of our own rules on a synthesised trace, by RAM policy.
        shares: of those loads: device, RAM, NVMe, substituted; RAM policy exclusive.
        guessed: the middle with a recall on misses of `RECALLS`, which the original did not have.
    """

    row: Row
    predicted: tuple[float, float, float] | None
    replayed: tuple[float, float]
    shares: tuple[float, float, float, float]
    guessed: tuple[float, float]

    @property
    def deviation(self) -> float:
        """The prediction over the middle of what was measured, less 1."""
        middle = self.predicted[1] if self.predicted else sum(self.replayed) / 2
        return middle / (sum(self.row.measured) / 2) - 1


def read_calibration(path: Path = _FILE) -> Calibration:
    """Read the frozen file.

    Raises:
        ConfigError: something is unknown, missing or without a source.
    """
    data, sources = load_toml(path), dict[str, str]()
    if data.keys() != {"fitted", "version", "row"}:
        raise ConfigError(f"{path}: tables {sorted(data)}; fitted, version and row are wanted")
    versions = [part_of(Version, v, f"version{i}", sources) for i, v in enumerate(data["version"])]
    return Calibration(
        fitted=part_of(Fitted, data["fitted"], "fitted", sources),
        versions={version.name: version for version in versions},
        rows=tuple(_row(table) for table in data["row"]),
        sources=sources,
    )


def _row(table: dict[str, Any]) -> Row:
    known = {f.name for f in fields(Row)}
    wanted = {f.name for f in fields(Row) if f.default is MISSING}
    if not wanted <= table.keys() <= known:
        raise ConfigError(f"row {table.get('name')}: {sorted(table)} instead of {sorted(known)}")
    return Row(**table)


def calibrate(calibration: Calibration | None = None) -> list[RowResult]:
    """Work out every row with the frozen constants; takes a few seconds."""
    given = calibration or read_calibration()
    return [_result(row, given) for row in given.rows]


def fit(calibration: Calibration) -> Fitted:
    """Fit the two constants to the rows whose role says so, by Newton's method."""
    rows = [row for row in calibration.rows if row.role == "fitted"]
    goal = np.array([1 / row.measured[0] for row in rows])

    def seconds(x: F64) -> F64:
        trial = replace(calibration, fitted=_fitted(x))
        return np.array([1 / _speed(row, trial, _middle(row)) for row in rows])

    x, steps = np.array([1.0, 0.5]), np.diag([1e-3, 1e-3])
    for _ in range(_FIT_STEPS):
        here = seconds(x)
        slope = np.stack([(seconds(x + step) - here) / step.sum() for step in steps], axis=1)
        x = x - np.linalg.solve(slope, here - goal)
    return _fitted(x)


def _fitted(x: F64) -> Fitted:
    return Fitted(drive_share=float(x[0]), layer_s=float(x[1]) * 1e-3)


def _result(row: Row, calibration: Calibration) -> RowResult:
    loads = {policy: _replayed(row, policy) for policy in _POLICIES}
    replayed = sorted(_speed(row, calibration, each) for each in loads.values())
    predicted, middle = None, loads["exclusive"]
    if row.device >= 0:
        middle = _middle(row)
        ends = [_speed(row, calibration, _assumed(row, s)) for s in _in_ram(row)]
        here = _speed(row, calibration, middle)
        predicted = (min(*ends, here), here, max(*ends, here))
    guessed = [
        _speed(row, calibration, middle, replace(_ORIGINAL, recall=recall)) for recall in RECALLS
    ]
    return RowResult(
        row=row, predicted=predicted, replayed=(replayed[0], replayed[1]),
        shares=(*loads["exclusive"].shares, loads["exclusive"].substituted),
        guessed=(guessed[0], guessed[1]),
    )  # fmt: skip


def _in_ram(row: Row) -> list[float]:
    """Return which share of the substitutes lies in RAM, by each RAM policy."""
    if row.substitutes_in_ram >= 0 or row.car == 0:
        return [max(row.substitutes_in_ram, 0.0)] * 2
    return [_replayed(row, policy).substitutes_in_ram for policy in _POLICIES]


def _middle(row: Row) -> Loads:
    return _assumed(row, sum(_in_ram(row)) / 2)


def _assumed(row: Row, in_ram: float) -> Loads:
    device = row.device + row.substituted * (1 - in_ram)
    ram = row.ram + row.substituted * in_ram
    shape = _shape()
    return assumed_loads((device, ram, max(0.0, 1 - device - ram)), shape.top_k, shape.n_layers,
                         _TOKENS - _WARMUP, seed=0)  # fmt: skip


def _speed(
    row: Row, calibration: Calibration, loads: Loads, schedule: Schedule = _ORIGINAL
) -> float:
    machine = _as_was(row, calibration)
    return decode(machine, _shape(), loads, schedule).tokens_per_s


def _as_was(row: Row, calibration: Calibration) -> Machine:
    """Return the row's machine under the original's software."""
    machine, version = find_machine(row.machine), calibration.versions[row.version]
    fitted, shape = calibration.fitted, _shape()
    soft = replace(machine.software, layer_s=version.layer_s or fitted.layer_s,
                   handoff_s=0.0, token_s=0.0)  # fmt: skip
    device = machine.device
    if version.dense_ms:
        dense = shape.dense_bytes / (version.dense_ms * 1e-3)
        experts = shape.token_expert_bytes / (version.experts_ms * 1e-3)
        device = replace(device, dense_rate=dense, expert_rate=experts)
    drives = machine.drives
    if row.machine == "desktop":  # the other box's drives were measured, not rated
        drives = tuple(replace(d, rate=d.rate * fitted.drive_share) for d in drives)
    return replace(machine, software=soft, devices=(device,), drives=drives)


@cache
def _shape() -> ModelShape:
    return shape_by_name(_MODEL)


def _replayed(row: Row, ram: RamPolicy) -> Loads:
    return _replay(row.car, (row.slots[0], row.slots[1]), ram)


@cache
def _replay(car: float, slots: tuple[int, int], ram: RamPolicy) -> Loads:
    shape = _shape()
    scores = synthetic_scores(_TOKENS, _SAMPLED_LAYERS, shape.n_experts, seed=0)
    tiers = Cache(device_slots=slots[0], ram_slots=slots[1], policy=LRU(), ram=ram)
    replay = Replay(top_k=shape.top_k, warmup=_WARMUP, devices=1, layers=shape.n_layers)
    return replay_loads(scores, tiers, CacheAwareRouting(car or _EXACT), replay)
