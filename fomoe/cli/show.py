"""`fomoe show`: what is in a model file and where a run would hold it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from fomoe.cli.opening import demo_budgets
from fomoe.cli.options import ModelOptions
from fomoe.config import Budgets, EngineConfig, format_bytes
from fomoe.devices import is_gpu
from fomoe.engine.hosting import dense_bytes, free_vram, most_pinned
from fomoe.engine.plan import make_plan, resolve
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TierShare:
    """What one tier would hold: a number of experts, the bytes of its slots."""

    experts: int
    slot_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """The facts that `fomoe show` prints.

    Attributes:
        type_bytes: Bytes in the file by tensor type.
        expert_bytes: Bytes of all routed experts; `dense_bytes` is everything else.
        expert_sizes: (bytes of one expert, number of layers) by size class.
        tiers: What `device`, `ram` and `nvme` would hold under the budgets.
    """

    path: str
    files: int
    name: str
    architecture: str
    file_bytes: int
    parameters: int
    type_bytes: dict[str, int]
    layers: int
    hidden: int
    vocabulary: int
    ctx_train: int
    experts_per_layer: int
    experts_per_token: int
    dense_bytes: int
    expert_bytes: int
    expert_sizes: list[tuple[int, int]]
    devices: list[str]
    vram_budget: int
    ram_budget: int
    tiers: dict[str, TierShare]


def summarise(options: ModelOptions, free_bytes: int) -> ModelSummary:
    """Read the header of a model and plan a run of it; no weights are read.

    Args:
        options: The model, the devices, and budgets where the user set them.
        free_bytes: Memory that default budgets may count on.

    Raises:
        GGUFError: the file is malformed, incomplete or not supported.
        BudgetError: a budget is too small; names the least that works.
    """
    file = open_gguf(options.path)
    spec = read_spec(file)
    table = ExpertTable.from_gguf(file, spec.n_layers)
    vram_budget, ram_budget, tiers = _tiers(options, table, spec, free_bytes)
    type_bytes: Counter[str] = Counter()
    parameters = 0
    for tensor in file.tensors.values():
        type_bytes[tensor.type.name] += tensor.nbytes
        parameters += math.prod(tensor.shape)
    expert_bytes = sum(table.expert_bytes(layer) * table.n_experts for layer in table.layers)
    sizes = Counter(table.expert_bytes(layer) for layer in table.layers)
    return ModelSummary(
        path=str(options.path),
        files=len(file.shards),
        name=spec.name,
        architecture=spec.architecture,
        file_bytes=sum(file.shard_bytes),
        parameters=parameters,
        type_bytes=dict(type_bytes.most_common()),
        layers=spec.n_layers,
        hidden=spec.hidden,
        vocabulary=spec.vocab,
        ctx_train=spec.ctx_train,
        experts_per_layer=table.n_experts,
        experts_per_token=spec.moe.top_k,
        dense_bytes=sum(type_bytes.values()) - expert_bytes,
        expert_bytes=expert_bytes,
        expert_sizes=sorted(sizes.items()),
        devices=list(options.device_names()),
        vram_budget=vram_budget,
        ram_budget=ram_budget,
        tiers=tiers,
    )


def _tiers(
    options: ModelOptions, table: ExpertTable, spec: ModelSpec, free_bytes: int
) -> tuple[int, int, dict[str, TierShare]]:
    devices = options.device_names()
    vram, ram = options.vram_budget, options.ram_budget
    if options.is_demo and not options.has_budget and not is_gpu(devices[0]):
        vram, ram = demo_budgets(table, len(devices))
    asked = EngineConfig(
        model=options.path, devices=devices, budgets=Budgets(vram_bytes=vram, ram_bytes=ram)
    )
    free = free_vram(asked) if vram is None else ()  # with a budget no GPU need be there
    config = resolve(asked, table, spec, free_bytes, free, most_pinned(asked))
    dense = dense_bytes(open_gguf(options.path), spec, config)
    plan = make_plan(table, spec, config, (0,) * len(devices), dense)
    on_device = sum(plan.topology.device_slots.values())
    in_ram = sum(plan.topology.ram_slots.values())
    device_bytes, ram_bytes = plan.slot_bytes()
    on_nvme = max(spec.n_layers * table.n_experts - on_device - in_ram, 0)
    mean_bytes = sum(table.expert_bytes(layer) for layer in table.layers) // spec.n_layers
    return (
        plan.vram_bytes,
        plan.ram_bytes,
        {
            "device": TierShare(experts=on_device, slot_bytes=device_bytes),
            "ram": TierShare(experts=in_ram, slot_bytes=ram_bytes),
            "nvme": TierShare(experts=on_nvme, slot_bytes=on_nvme * mean_bytes),
        },
    )


def _rows(summary: ModelSummary) -> list[tuple[str, str]]:
    types = "  ".join(f"{name} {format_bytes(n)}" for name, n in summary.type_bytes.items())
    sizes = ", ".join(
        f"{format_bytes(n)} in {_count(layers, 'layer')}" for n, layers in summary.expert_sizes
    )
    experts = summary.layers * summary.experts_per_layer
    return [
        ("file", f"{Path(summary.path).name}, {_count(summary.files, 'file')}"),
        ("model", f"{summary.name} ({summary.architecture})"),
        ("size", f"{format_bytes(summary.file_bytes)}, {summary.parameters:,} parameters"),
        ("types", types),
        ("shape", f"{summary.layers} layers, hidden {summary.hidden}, "
                  f"vocabulary {summary.vocabulary:,}, trained on {summary.ctx_train:,} tokens"),
        ("dense part", f"{format_bytes(summary.dense_bytes)}, always resident"),
        ("experts", f"{experts:,} ({summary.experts_per_layer} per layer, "
                    f"{summary.experts_per_token} per token), "
                    f"{format_bytes(summary.expert_bytes)}"),
        ("one expert", sizes),
        ("budgets", f"{format_bytes(summary.vram_budget)} on each of "
                    f"{', '.join(summary.devices)}; {format_bytes(summary.ram_budget)} of RAM"),
        *((f"in {tier}", f"{share.experts:,} experts ({share.experts / experts:.0%}), "
                         f"{format_bytes(share.slot_bytes)}")
          for tier, share in summary.tiers.items()),
    ]  # fmt: skip


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def show(
    model: ModelOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a model file and what each tier would hold; reads no weights."""
    summary = summarise(model, psutil.virtual_memory().available)
    if as_json:
        typer.echo(json.dumps(asdict(summary)))
        return
    table = Table(show_header=False, box=None)
    for name, value in _rows(summary):
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)
