"""A machine as the twin sees it: rates, sizes and latencies, each with its source, from TOML.

The file has one table of each of these kinds; `drive` may repeat. Every number but a count needs an
entry of the same name under `source` in its table, so that none is without a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe.errors import ConfigError
from fomoe.sim.tables import Part, load_toml, part_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Host(Part):
    """A node's processor and memory.

    Attributes:
        ram_bytes: of the node; `reserved_bytes` of it are not for experts.
        memory_rate: bytes per second that all cores and devices together read or write.
        cpu_rate: bytes of weights per second that the cores multiply with; 0 where they do not.
    """

    ram_bytes: float
    reserved_bytes: float = 0.0
    memory_rate: float
    cpu_rate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Part):
    """What computes layers, `count` of a kind in each node.

    Attributes:
        memory_bytes: of one; `reserved_bytes` of it hold neither weights nor state. 0: the
            host's memory is its memory, and nothing is copied.
        dense_rate: bytes of dense weights per second, for one token.
        expert_rate: bytes of routed experts per second, for one token.
        link_rate: bytes per second from the host, each way; 0 where nothing is copied.
        matrix_rate: multiply-adds per second for many tokens.
        shares_cores: whether the devices of a node take turns on the same cores.
    """

    count: int = 1
    memory_bytes: float = 0.0
    reserved_bytes: float = 0.0
    dense_rate: float
    expert_rate: float
    link_rate: float = 0.0
    matrix_rate: float
    shares_cores: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive(Part):
    """What holds the file, `count` of a kind in each node.

    A request of n bytes keeps it for `n / rate + request_s` and lands `latency_s` later.
    """

    count: int = 1
    rate: float
    latency_s: float = 0.0
    request_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Network(Part):
    """Between nodes: bytes per second, and seconds of one message besides its bytes."""

    rate: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Software(Part):
    """What the engine itself takes, on the critical path.

    Attributes:
        layer_s: of a layer: decisions, messages, launches.
        handoff_s: the hidden state's way from one device to another.
        token_s: of a token: sampling, events.
        reads_s: of a layer that reads, besides the drive's time: asking, waking, landing.
    """

    layer_s: float
    handoff_s: float = 0.0
    token_s: float = 0.0
    reads_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`nodes` equal nodes and what runs on them.

    Attributes:
        name: short, as `--machine` takes it.
        title: what it is, one line.
        sources: where each number comes from, by table and field: "drive0.rate".
        is_measured: whether `fomoe bench` wrote it, so that its numbers are known better.
    """

    name: str
    title: str
    nodes: int
    host: Host
    devices: tuple[Device, ...]
    drives: tuple[Drive, ...]
    software: Software
    network: Network | None
    sources: Mapping[str, str] = field(compare=False)
    is_measured: bool = False

    def __post_init__(self) -> None:
        if self.nodes < 1 or not self.devices or not self.drives:
            raise ConfigError(f"{self.name}: a machine needs a node, a device and a drive")
        if self.nodes > 1 and self.network is None:
            raise ConfigError(f"{self.name}: {self.nodes} nodes need a [network]")
        if len(self.devices) > 1:
            raise ConfigError(f"{self.name}: {len(self.devices)} kinds of devices; give one")

    @property
    def device(self) -> Device:
        """Its kind of device."""
        return self.devices[0]

    @property
    def n_devices(self) -> int:
        """All devices of all nodes."""
        return self.nodes * self.device.count

    @property
    def drive_rates(self) -> tuple[float, ...]:
        """Bytes per second of each drive of a node."""
        return tuple(d.rate for d in self.drives for _ in range(d.count))

    def describe(self) -> str:
        """Return a line for people."""
        return f"{self.name}: {self.title}"


def read_machine(path: Path) -> Machine:
    """Read a machine's file.

    Raises:
        ConfigError: it is not TOML, a table or a number is unknown, missing or without a source.
    """
    data = load_toml(path)
    try:
        return _machine(data, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_machine(name: str) -> Machine:
    """Read the machine of that name among those that come with fomoe, or the file of that path.

    Raises:
        ConfigError: there is neither, or the file is wrong.
    """
    if name.endswith(".toml") or "/" in name:
        return read_machine(Path(name))
    known = machine_files()
    if name not in known:
        raise ConfigError(
            f"machine {name!r} is unknown: take one of {', '.join(sorted(known))}, or a file that "
            "`fomoe bench MODEL --machine FILE.toml` has written"
        )
    return read_machine(known[name])


def machine_files() -> dict[str, Path]:
    """Return the machines that come with fomoe, in an installed wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "_machines", package.parent / "deploy" / "machines"):
        if place.is_dir():
            return {path.stem: path for path in place.glob("*.toml")}
    return {}


def _machine(data: dict[str, Any], name: str) -> Machine:
    sources: dict[str, str] = {}
    plain = {"title": str, "nodes": int, "is_measured": bool}
    tables = {"host": Host, "software": Software, "network": Network}
    lists = {"device": Device, "drive": Drive}
    unknown = data.keys() - plain.keys() - tables.keys() - lists.keys()
    if unknown:
        raise ConfigError(f"unknown: {', '.join(sorted(unknown))}")
    for key, kind in plain.items():
        if key in data and not isinstance(data[key], kind):
            raise ConfigError(f"{key} must be a {kind.__name__}")
    parts: dict[str, Any] = {}
    for key, part in tables.items():
        if key in data:
            parts[key] = part_of(part, data[key], key, sources)
    for key, part in lists.items():
        rows = data.get(key, [])
        if not isinstance(rows, list):
            raise ConfigError(f"{key} must be a list: write [[{key}]]")
        parts[key] = tuple(part_of(part, row, f"{key}{i}", sources) for i, row in enumerate(rows))
    missing = [key for key in ("host", "software") if key not in parts]
    if missing or "title" not in data:
        raise ConfigError(f"missing: {', '.join(missing or ['title'])}")
    return Machine(
        name=name, title=data["title"], nodes=data.get("nodes", 1), host=parts["host"],
        devices=parts["device"], drives=parts["drive"], software=parts["software"],
        network=parts.get("network"), sources=sources, is_measured=data.get("is_measured", False),
    )  # fmt: skip
