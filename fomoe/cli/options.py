"""Options that several verbs share, as dataclasses that become options of each verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fomoe.config import (
    BUNDLED_MODEL,
    Activations,
    Attention,
    EngineConfig,
    KVDtype,
    LogicalEviction,
    RamPolicy,
    ServerConfig,
    Transport,
    default_model,
    parse_bytes,
    parse_devices,
)
from fomoe.errors import ConfigError
from fomoe.quality import Quality, car_quality, parse_quality

_DEFAULTS = EngineConfig(model=Path())
_ROUTING = _DEFAULTS.routing


def flattened(verb: Callable[..., None]) -> Callable[..., None]:
    """Return the verb with each dataclass among its parameters replaced by the fields of it."""
    # Not get_type_hints: before Python 3.11 it hides Annotated behind a default of None.
    signature = inspect.signature(verb, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: each.annotation for name, each in signature.items() if is_dataclass(each.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(verb)
    def command(**values: Any) -> None:
        arguments = {
            name: group(**{part.name: values.pop(part.name) for part in fields(group)})
            for name, group in groups.items()
        }
        verb(**arguments, **values)

    vars(command).pop("__wrapped__")
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            part.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if part.default is MISSING else part.default,
            annotation=hints[part.name],
        )
        for part in fields(group)
    ]


def parse_size(text: str) -> int:
    """Parse an option that is a size; see `parse_bytes`."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def _quality(text: str) -> Quality:
    try:
        return parse_quality(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, on which devices, in how much memory."""

    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL", help="GGUF file, any shard of it; the bundled model if left out."
        ),
    ] = None
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Devices, with commas: cpu,cpu or cuda:0,cuda:1. Default: cpu."
        ),
    ] = None
    vram_budget: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Memory of each device, for example 12GiB; on cpu devices the expert slots.",
        ),
    ] = None
    ram_budget: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="Memory of the RAM tier of each node."
        ),
    ] = None

    @property
    def path(self) -> Path:
        """The model file, the bundled one when none is named."""
        return default_model() if self.model is None else self.model

    @property
    def is_demo(self) -> bool:
        """Whether it is the bundled model, or a copy of it."""
        return self.model is None or self.model.name == BUNDLED_MODEL

    @property
    def has_budget(self) -> bool:
        """Whether a budget was given for either tier."""
        return self.vram_budget is not None or self.ram_budget is not None

    def device_names(self) -> tuple[str, ...]:
        """Return the devices; the bundled model has two, so that all of fomoe is at work."""
        if self.devices is not None:
            return parse_devices(self.devices)
        return ("cpu", "cpu") if self.is_demo else ("cpu",)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the model runs."""

    ctx_size: Annotated[
        int, typer.Option(metavar="TOKENS", help="Longest prompt and answer together.")
    ] = _DEFAULTS.ctx_size
    quality: Annotated[
        Quality | None,
        typer.Option(
            parser=_quality,
            metavar="CONTRACT",
            help="What answers are held to: exact (default), kl=0.01 (mean loss), "
            "bytes=500MB/token (mean reads), price=0.05 or car=0.35.",
        ),
    ] = None
    car: Annotated[
        float | None,
        typer.Option(
            metavar="0..1",
            help="Short for --quality car=...: lets a resident expert stand in for a missing one "
            "that it comes this close to. 0 is exact.",
        ),
    ] = None
    car_capacity: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Experts per layer that lossy routing takes as resident. "
            "Default: what the budgets hold.",
        ),
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Frequencies of experts, from fomoe profile: the most frequent are in memory "
            "from the start.",
        ),
    ] = None
    logical_eviction: Annotated[
        LogicalEviction,
        typer.Option(
            help="Lossy routing: who leaves what it takes as resident, by decayed frequency and "
            "age, by age, or by mean probability.",
        ),
    ] = _ROUTING.logical_eviction
    backfill: Annotated[
        str,
        typer.Option(
            metavar="N|N/M",
            help="Lossy routing: experts read in the background per layer and token, of those "
            "left out, for example 28/60.",
        ),
    ] = _ROUTING.backfill
    warmup: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", min=0, help="Lossy routing: the first generated tokens are exact."
        ),
    ] = _ROUTING.warmup
    shadow_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Lossy routing: measure the loss at one token in N; 0 only where a contract "
            "needs it.",
        ),
    ] = _DEFAULTS.routing.shadow_every
    loss_profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What a substitution costs in each layer. Default: MODEL.loss.json, if it is "
            "there.",
        ),
    ] = None
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads of each process's kernels.")
    ] = None
    kv_dtype: Annotated[KVDtype, typer.Option(help="Number format of the KV cache.")] = "f16"
    activations: Annotated[
        Activations, typer.Option(help="Input of the quantised kernels; f32 is for comparisons.")
    ] = "int8"
    attention: Annotated[
        Attention,
        typer.Option(
            help="Which process runs attention and all else but experts: on GPUs the devices' "
            "actors (auto, device), or the driver on the same devices; on cpu the driver."
        ),
    ] = "auto"
    ram_policy: Annotated[
        RamPolicy, typer.Option(help="Whether an expert on a device keeps its place in RAM.")
    ] = _DEFAULTS.ram_policy
    prefetch: Annotated[
        bool, typer.Option(help="Read experts before the router asks for them.")
    ] = True
    prefetch_depth: Annotated[
        int, typer.Option(metavar="0..2", help="Layers that a generated token looks ahead.")
    ] = _DEFAULTS.prefetch_depth
    prefetch_budget: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Bytes that reads in vain may add to a generated token's, as a share of them.",
        ),
    ] = _DEFAULTS.prefetch_budget
    cpu_arm: Annotated[
        str,
        typer.Option(
            metavar="off|auto|TABLE",
            help="Experts that the processor computes in RAM beside GPUs: by measured costs, or "
            "by a receipt's table.",
        ),
    ] = _DEFAULTS.cpu_arm
    overlap: Annotated[
        bool, typer.Option("--overlap/--serial", help="Compute and read at the same time.")
    ] = True
    prefill_chunk: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Prompt tokens that pass a layer together; 0 is as many as the budgets allow.",
        ),
    ] = _DEFAULTS.prefill_chunk
    transport: Annotated[Transport, typer.Option(help="How the actors talk; auto finds out.")] = (
        "auto"
    )
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ray cluster to join; found by itself if local."),
    ] = None

    @property
    def contract(self) -> Quality:
        """What answers are held to.

        Raises:
            ConfigError: both --quality and --car are given, or --car is out of range.
        """
        if self.quality is not None and self.car is not None:
            raise ConfigError("--car is short for --quality car=...; give one of the two")
        if self.car is not None:
            return car_quality(self.car)
        return self.quality or Quality()


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What is kept of the router's decisions."""

    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append what the router said for each token to FILE, for `fomoe replay`.",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens and who may talk to it."""

    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(metavar="N", help="TCP port; 0 takes a free one.")] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Secret that clients must send; others can see it in ps."),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that holds the secret.")
    ] = None
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name that clients see.")
    ] = None

    def config(self) -> ServerConfig:
        """Return the checked configuration.

        Raises:
            ConfigError: the host needs a key, or the key's file cannot be read.
        """
        return ServerConfig(
            host=self.host,
            port=self.port,
            api_key=self._key(),
            model_name=self.model_name,
        )

    def _key(self) -> str | None:
        if self.api_key_file is None:
            return self.api_key
        if self.api_key is not None:
            raise ConfigError("both --api-key and --api-key-file are given; keep one of them")
        try:
            return self.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API key cannot be read: {error}") from None
