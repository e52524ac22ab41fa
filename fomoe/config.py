"""Every option of fomoe as frozen dataclasses, and the one place that reads the environment.

The parts are composed, not inherited: `EngineConfig` holds `Budgets` and `RoutingConfig`;
`ServerConfig` stands beside it. A wrong value raises `ConfigError` when the object is made, so
that nothing downstream has to check again.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

from fomoe.checks import (
    require,
    require_arm,
    require_choice,
    require_range,
    require_sensitivities,
    require_share,
)
from fomoe.devices import check_devices, is_gpu
from fomoe.devices import parse_devices as parse_devices
from fomoe.errors import ConfigError
from fomoe.quality import Quality, parse_quality
from fomoe.units import format_bytes as format_bytes
from fomoe.units import parse_bytes as parse_bytes

KVDtype = Literal["f16", "f32"]
Activations = Literal["int8", "f32"]
RamPolicy = Literal["exclusive", "inclusive"]
Eviction = Literal["lfru", "lru"]
LogicalEviction = Literal["lfru", "lru", "mass"]
Transport = Literal["auto", "shm", "tcp"]
Attention = Literal["auto", "driver", "device"]

BUNDLED_MODEL = "fomoe-demo-Q4_K_M.gguf"

_ENVIRONMENT = {
    "FOMOE_MODEL": "model",
    "FOMOE_DEVICES": "devices",
    "FOMOE_VRAM_BUDGET": "vram_budget",
    "FOMOE_RAM_BUDGET": "ram_budget",
    "FOMOE_CTX_SIZE": "ctx_size",
    "FOMOE_THREADS": "threads",
    "FOMOE_TRANSPORT": "transport",
    "FOMOE_ADDRESS": "address",
    "FOMOE_HOST": "host",
    "FOMOE_PORT": "port",
    "FOMOE_API_KEY": "api_key",
    "FOMOE_API_KEY_FILE": "api_key_file",
}

_Part = TypeVar("_Part", "Budgets", "RoutingConfig", "EngineConfig", "ServerConfig")


def default_model() -> Path:
    """Return the path of the bundled demo model, in an installed wheel or in a checkout.

    Raises:
        ConfigError: the file is in neither place.
    """
    package = Path(__file__).resolve().parent
    places = (package / "_models" / BUNDLED_MODEL, package.parent / "models" / BUNDLED_MODEL)
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"the bundled model {BUNDLED_MODEL} is neither at {places[0]} nor at {places[1]}; "
        "name a model file: fomoe serve MODEL.gguf"
    )


def environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what FOMOE_* of `environ`, or of this process, set: option name to text.

    Raises:
        ConfigError: a FOMOE_ variable has a name that fomoe does not know.
    """
    variables = os.environ if environ is None else environ
    ours = {name: value for name, value in variables.items() if name.startswith("FOMOE_")}
    unknown = sorted(ours.keys() - _ENVIRONMENT.keys())
    if unknown:
        raise ConfigError(
            f"unknown environment variable {', '.join(unknown)}; known: {', '.join(_ENVIRONMENT)}"
        )
    return {_ENVIRONMENT[name]: value for name, value in ours.items()}


def notify_socket() -> str | None:
    """Return the socket on which systemd waits for news of this process; None without one."""
    return os.environ.get("NOTIFY_SOCKET")


def cache_dir() -> Path:
    """Return this user's directory for what can be made again, such as compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fomoe"


def runtime_dir() -> Path:
    """Return this user's private directory for files about running servers; made if missing.

    Raises:
        ConfigError: the directory belongs to another user.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        directory = Path(base) / "fomoe"
    else:
        directory = Path(tempfile.gettempdir()) / f"fomoe-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid() or directory.is_symlink():
        raise ConfigError(
            f"{directory} belongs to another user; set XDG_RUNTIME_DIR to a directory of yours"
        )
    return directory


def _from_dict(cls: type[_Part], values: Mapping[str, Any]) -> _Part:
    known = {part.name for part in fields(cls)}
    unknown = sorted(values.keys() - known)
    require(
        not unknown,
        f"unknown option {', '.join(unknown)} for {cls.__name__}; "
        f"known: {', '.join(sorted(known))}",
    )
    return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that experts may take; None leaves the figure to measured free memory.

    Attributes:
        vram_bytes: Per device: everything on a GPU, the expert slots of a `cpu` device.
        ram_bytes: Per node: the shared segment of the RAM tier; 0 means no RAM tier.
    """

    vram_bytes: int | None = None
    ram_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("vram_bytes", "ram_bytes"):
            value = getattr(self, name)
            if value is not None:
                require_range(name, value, 0, 1 << 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How experts are chosen; the default is exact.

    Attributes:
        quality: What a request is held to that asks for nothing else; a text is parsed.
        car_capacity: Experts per layer that lossy routing takes as resident; None lets the
            budgets fix it at start.
        logical_eviction: Who leaves what lossy routing takes as resident: by decayed frequency and
            age, by age, or by the router's mean probability.
        backfill: Experts that lossy routing left out and that are read in the background, per
            layer and token, as a number or a fraction such as 28/60.
        warmup: The first so many generated tokens are exact.
        shadow_every: One generated token in so many is also computed exactly where routing is
            lossy, which estimates the loss; 0 does so only where a contract needs it (`kl`).
        sensitivities: What a substitution costs in each layer, as a multiple of an average one;
            prices are divided by it. Empty: all layers are alike.
    """

    quality: Quality = field(default_factory=Quality)
    car_capacity: int | None = None
    logical_eviction: LogicalEviction = "lfru"
    backfill: str = "0"
    warmup: int = 0
    shadow_every: int = 64
    sensitivities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        given: Any = self.quality
        if isinstance(given, str):
            object.__setattr__(self, "quality", parse_quality(given))
        else:
            require(isinstance(given, Quality), f"quality is {given!r}; give a text or a Quality")
        require_choice("logical_eviction", self.logical_eviction, LogicalEviction)
        require_share("backfill", self.backfill)
        require_range("warmup", self.warmup, 0, 1 << 40)
        if self.car_capacity is not None:
            require_range("car_capacity", self.car_capacity, 1, 1 << 16)
        require_range("shadow_every", self.shadow_every, 0, 1 << 20)
        object.__setattr__(self, "sensitivities", tuple(self.sensitivities))
        require_sensitivities(self.sensitivities)

    @property
    def backfill_share(self) -> Fraction:
        """`backfill` as a number."""
        return Fraction(self.backfill)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that the actors need to know of the command line.

    Attributes:
        model: The GGUF file, any shard of it.
        devices: One name per device: `cpu`, `cpu:N`, `hip:N` or `cuda:N`.
        attention: Which process runs attention and all else but experts: on GPUs the actors of the
            devices, or the driver on the same devices; auto: the actors where there are GPUs.
        budgets: Bytes for experts, per device and per node.
        routing: How experts are chosen.
        ctx_size: Tokens that one sequence may hold; its KV cache is reserved at start.
        sequences: Sequences that may hold state at the same time.
        threads: Threads of one process's kernels; None shares the cores among the processes.
        kv_dtype: Number format of the KV cache.
        activations: Input of the quantised kernels: int8 blocks, or float32 for comparisons.
        ram_policy: Whether an expert on a device also keeps its place in RAM.
        eviction: Which resident expert makes room.
        prefetch: Read experts before the router asks for them, in prompts and in answers.
        prefetch_depth: Layers that a generated token looks ahead, 0 to 2.
        prefetch_budget: Bytes that reads in vain may add to a generated token's, as a share of
            what would be read without them.
        cpu_arm: Whether the processor computes some of a token's experts in RAM beside GPUs: off,
            auto (a table from costs measured at the start), or the table of a receipt. The table
            is part of what fixes a text, so a text that is to come again takes a given one.
        overlap: False runs the serial twin of the loop, which gives the same bits.
        prefill_chunk: Prompt tokens that go through a layer together; 0 lets the budgets fix it.
        read_threads: File reads in flight per node.
        transport: How actors talk: shared memory, TCP, or by handshake.
        seed: Seed of everything that draws random numbers outside a request.
        profile: Frequencies of experts; the most frequent are in memory from the start.
        trace: File to which the router's rows of every request are appended; None records nothing.
    """

    model: Path
    devices: tuple[str, ...] = ("cpu",)
    attention: Attention = "auto"
    budgets: Budgets = field(default_factory=Budgets)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    ctx_size: int = 4096
    sequences: int = 1
    threads: int | None = None
    kv_dtype: KVDtype = "f16"
    activations: Activations = "int8"
    ram_policy: RamPolicy = "exclusive"
    eviction: Eviction = "lfru"
    prefetch: bool = True
    prefetch_depth: int = 1
    prefetch_budget: float = 0.05
    cpu_arm: str = "off"
    overlap: bool = True
    prefill_chunk: int = 0
    read_threads: int = 4
    transport: Transport = "auto"
    seed: int = 0
    profile: Path | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", Path(self.model))
        for name in ("profile", "trace"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        object.__setattr__(self, "devices", tuple(self.devices))
        self._check_devices()
        require_choice("kv_dtype", self.kv_dtype, KVDtype)
        require_choice("activations", self.activations, Activations)
        require_choice("ram_policy", self.ram_policy, RamPolicy)
        require_choice("eviction", self.eviction, Eviction)
        self._check_cpu_arm()
        require_choice("transport", self.transport, Transport)
        require_range("ctx_size", self.ctx_size, 1, 1 << 20)
        require_range("sequences", self.sequences, 1, 256)
        require_range("prefill_chunk", self.prefill_chunk, 0, 4096)
        require_range("read_threads", self.read_threads, 1, 64)
        require_range("prefetch_depth", self.prefetch_depth, 0, 2)
        budget: Any = self.prefetch_budget
        require(
            isinstance(budget, (int, float)) and 0.0 <= budget <= 1.0,
            f"prefetch_budget is {budget!r}; it must lie between 0 and 1",
        )
        require_range("seed", self.seed, 0, (1 << 64) - 1)
        if self.threads is not None:
            require_range("threads", self.threads, 1, 1024)

    @property
    def hosts_layers(self) -> bool:
        """Whether layers run on GPUs, and the driver holds no tensor in the host's memory."""
        return is_gpu(self.devices[0])

    @property
    def splits_layers(self) -> bool:
        """Whether the driver's process runs all but the routed experts of layers on GPUs."""
        return self.hosts_layers and self.attention == "driver"

    def _check_devices(self) -> None:
        check_devices(self.devices)
        require_choice("attention", self.attention, Attention)
        require(
            self.hosts_layers or self.attention != "device",
            f"attention is 'device' on {', '.join(self.devices)}; cpu devices compute experts "
            "alone: leave it at auto",
        )
        elsewhere = [name for name in self.devices if "@" in name]
        require(
            not (self.splits_layers and elsewhere),
            f"attention is 'driver' on {', '.join(elsewhere)}; the driver's process can open the "
            "GPUs of its own machine alone: leave the @NODE out, or use device",
        )

    def _check_cpu_arm(self) -> None:
        require_arm("cpu_arm", self.cpu_arm)
        if self.cpu_arm == "off":
            return
        named = f"cpu_arm is {self.cpu_arm!r} on {', '.join(self.devices)}"
        require(self.hosts_layers, f"{named}; a cpu device computes in RAM anyway: leave it off")
        require(
            not any("@" in device for device in self.devices),
            f"{named}; this version computes in RAM on the driver's node alone: use off",
        )
        require(
            not self.splits_layers,
            f"cpu_arm is {self.cpu_arm!r} with attention 'driver'; not built for both: use "
            "attention device, or cpu_arm off",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that msgpack can carry; `from_dict` makes an equal object."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return values | {
            "model": str(self.model),
            "profile": None if self.profile is None else str(self.profile),
            "trace": None if self.trace is None else str(self.trace),
            "devices": list(self.devices),
            "budgets": {part.name: getattr(self.budgets, part.name) for part in fields(Budgets)},
            "routing": {
                part.name: getattr(self.routing, part.name) for part in fields(RoutingConfig)
            }
            | {
                "quality": str(self.routing.quality),
                "sensitivities": list(self.routing.sensitivities),
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Return the configuration of `to_dict`'s values.

        Raises:
            ConfigError: a key is unknown or a value is out of range.
        """
        parts = dict(values)
        if isinstance(parts.get("budgets"), Mapping):
            parts["budgets"] = _from_dict(Budgets, parts["budgets"])
        if isinstance(parts.get("routing"), Mapping):
            parts["routing"] = _from_dict(RoutingConfig, parts["routing"])
        return _from_dict(cls, parts)


def is_loopback(host: str) -> bool:
    """Say whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the HTTP server listens and who may talk to it.

    Attributes:
        host: Address to listen on; anything but loopback needs an API key.
        port: TCP port; 0 lets the system choose one.
        api_key: Secret that every request but `/health` must carry; None asks for none.
        model_name: Name under which the model is offered; None takes it from the file.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_name: str | None = None

    def __post_init__(self) -> None:
        require_range("port", self.port, 0, 65535)
        require(self.api_key != "", "the API key is empty; give a key or leave the option out")
        require(
            self.api_key is not None or is_loopback(self.host),
            f"host {self.host} can be reached from other machines, so an API key is needed: add "
            "--api-key-file FILE (or --api-key KEY), or listen on 127.0.0.1",
        )
