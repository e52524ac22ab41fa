"""`fomoe bench`: prefill and decode apart, where the time went, and shares of the machine's rates.

Habits are llama-bench's: `-p` prompt tokens, `-n` generated tokens, `-r` repetitions after one
that is not counted, medians.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import psutil
import typer

from fomoe.cli.machine_file import check_target, part_of, write_machine
from fomoe.cli.opening import opened, progress_bar
from fomoe.cli.options import EngineOptions, ModelOptions, TraceOptions
from fomoe.engine.requests import Finished, GenerateRequest, Receipt, SamplingParams, TokenEvent
from fomoe.engine.waterfall import PARTS
from fomoe.errors import ConfigError, EngineError, StorageError
from fomoe.gguf.extents import ExpertTable
from fomoe.kernels.cpu import ops
from fomoe.storage.rates import direct_read_rate

if TYPE_CHECKING:
    from fomoe.llm import LLM

_MEMORY_BYTES = 256 << 20  # several times a last-level cache
_PASSES = 8
_EXPERT_TENSOR = "_exps."


def memory_read_rate(threads: int) -> float:
    """Return bytes per second of the fastest of a few passes through memory."""
    ops.set_threads(threads)
    data, best = np.ones(_MEMORY_BYTES, np.uint8), float("inf")
    for _ in range(_PASSES):
        started = time.perf_counter()
        ops.stream_read(data)
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second that the machine was measured to read; 0 where it was not."""

    memory: float
    drive: float

    @classmethod
    def measured(cls, path: Path, threads: int) -> Rates:
        """Measure now: `threads` threads through memory, then the model's file past the cache.

        0 threads leave memory out, through which no weights of GPUs go.
        """
        try:
            drive = direct_read_rate(path)
        except StorageError:
            drive = 0.0
        return cls(memory_read_rate(threads) if threads else 0.0, drive)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of weights that a generated token is multiplied with."""

    dense: int
    experts: int

    @classmethod
    def of(cls, llm: LLM) -> Sizes:
        """Add up the file's tensors: all dense ones but the embedding, top-k experts a layer."""
        tensors = llm.file.tensors
        table = ExpertTable.from_gguf(llm.file, llm.spec.n_layers)
        unread = {"token_embd.weight"} if "output.weight" in tensors else set()
        dense = sum(
            info.nbytes
            for name, info in tensors.items()
            if _EXPERT_TENSOR not in name and name not in unread
        )
        experts = sum(table.expert_bytes(i) for i in range(llm.spec.n_layers))
        return cls(dense, experts * llm.spec.moe.top_k)


def _ids(source: Path | None, count: int, vocab: int) -> list[int]:
    """Return `count` token ids: the first of a JSON list, or random ones by a fixed seed."""
    if source is None:
        return [int(i) for i in np.random.default_rng(0).integers(0, vocab, count)]
    try:
        content = json.loads(source.read_text())
        ids = [int(i) for i in (content["ids"] if isinstance(content, dict) else content)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source}: not a JSON list of token ids ({error})") from None
    if len(ids) < count or not all(0 <= i < vocab for i in ids[:count]):
        raise ConfigError(
            f"{source}: {len(ids):,} ids, {count:,} below {vocab:,} are wanted; "
            "use smaller -p and -n"
        )
    return ids[:count]


def _run_once(
    llm: LLM, name: str, prompt: list[int], forced: list[int], waterfall: bool
) -> tuple[Receipt, list[list[float]]]:
    """Run one request that feeds `forced` after the prompt; returns receipt and token parts."""
    request = GenerateRequest(
        request_id=name, prompt=prompt, max_tokens=len(forced), forced=forced,
        waterfall=waterfall, sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip
    parts: list[list[float]] = []
    for event in llm.engine.stream(request):
        if isinstance(event, TokenEvent):
            parts.append(event.parts_s)
        elif isinstance(event, Finished):
            if event.error is not None:
                raise EngineError(event.error)
            return event.receipt, parts
    raise EngineError("the engine ended without an answer")


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _prefill_figures(receipts: list[Receipt]) -> dict[str, Any]:
    tokens = receipts[0].prompt_tokens
    return {
        "tokens": tokens,
        "tokens_per_s": _spread([1e3 * tokens / r.prompt_ms for r in receipts]),
        "parts_ms": {
            part: statistics.median(r.prompt_parts_ms[part] for r in receipts) for part in PARTS
        },
        "hits": {
            "device": sum(r.prompt_hits_device for r in receipts),
            "ram": sum(r.prompt_hits_ram for r in receipts),
            "nvme": sum(r.prompt_reads_nvme for r in receipts),
        },
    }


def _decode_figures(receipts: list[Receipt], sizes: Sizes, rates: Rates) -> dict[str, Any]:
    # The first token comes out of the prompt's last pass.
    steps = receipts[0].generated_tokens - 1
    seconds = statistics.median(r.generated_ms for r in receipts) / 1e3 / steps
    parts = {
        part: statistics.median(r.generated_parts_ms[part] / steps for r in receipts)
        for part in PARTS
    }
    weights = sizes.dense + sizes.experts
    read = sum(r.nvme_bytes - r.prompt_bytes for r in receipts) / steps / len(receipts)
    return {
        "tokens": steps,
        "tokens_per_s": _spread([1e3 * steps / r.generated_ms for r in receipts]),
        "parts_ms": parts,
        "hits": _outcomes(receipts),
        "contract": _contract_figures(receipts, steps),
        "weight_bytes_per_token": weights,
        "share_of_memory": weights / seconds / rates.memory if rates.memory else 0.0,
        "nvme_bytes_per_token": read,
    }


def _outcomes(receipts: list[Receipt]) -> dict[str, int]:
    """Return activations of generated tokens by outcome; exact ones are never substituted."""
    total = Counter[str]()
    for receipt in receipts:
        total.update(receipt.outcomes)
    is_exact = receipts[0].mode == "exact"
    return {name: n for name, n in total.items() if not (is_exact and name == "substituted")}


def _contract_figures(receipts: list[Receipt], steps: int) -> dict[str, Any]:
    """Return what the quality contract was, what it cost and what was read for it, per token."""
    tokens = steps * len(receipts)
    shadows = sum(r.shadow_steps for r in receipts)
    causes = Counter[str]()
    for receipt in receipts:
        causes.update(receipt.bytes_by_cause)
    return {
        "quality": receipts[0].mode,
        "substituted_per_token": sum(r.substituted for r in receipts) / tokens,
        "router_mass_lost_per_token": sum(r.lost_mass for r in receipts) / tokens,
        "estimated_kl": sum(r.shadow_kl for r in receipts) / shadows if shadows else None,
        "shadow_steps": shadows,
        "price": receipts[-1].price,
        "bytes_per_token": {cause: n / tokens for cause, n in causes.items() if cause != "prompt"},
        "logical_bytes_per_token": sum(r.logical_bytes for r in receipts) / tokens,
    }


def _contract_line(contract: dict[str, Any]) -> str:
    kl = contract["estimated_kl"]
    said = "no shadow steps" if kl is None else f"KL {kl:.2g} ({contract['shadow_steps']} steps)"
    read = ", ".join(f"{cause} {n / 1e6:.3g}" for cause, n in contract["bytes_per_token"].items())
    return (
        f"         {contract['quality']}: {contract['substituted_per_token']:.1f} substituted a "
        f"token, {said}, price {contract['price']:.2g}; MB read a token: {read}"
    )


def _read_figures(reads: dict[str, float], rates: Rates) -> dict[str, float]:
    """Return how fast the drive was while experts were wanted, over all runs."""
    seconds = reads["demand_open_s"]
    rate = reads["demand_bytes"] / seconds if seconds else 0.0
    return reads | {
        "demand_bytes_per_s": rate,
        "demand_share_of_drive": rate / rates.drive if rates.drive else 0.0,
    }


def _head(figures: dict[str, Any]) -> list[str]:
    """Return what ran where; of GPUs nothing about the processor, which computes nothing."""
    rates, drive = figures["rates"], f"drive {figures['rates']['drive'] / 1e9:.2f} GB/s"
    if not rates["memory"]:
        return [f"{figures['model']}  {', '.join(figures['devices'])}", drive]
    return [
        f"{figures['model']}  {figures['threads']} threads  {figures['isa']}",
        f"memory {rates['memory'] / 1e9:.1f} GB/s   {drive}",
    ]


def _lines(figures: dict[str, Any]) -> list[str]:
    rates, lines = figures["rates"], _head(figures)
    for name in ("prefill", "decode"):
        test = figures.get(name)
        if test is None:
            continue
        speed = test["tokens_per_s"]
        hits, total = test["hits"], max(1, sum(test["hits"].values()))
        lines.append(
            f"{name:8} {test['tokens']:6,} tokens  {speed['median']:9.1f} tok/s "
            f"({speed['min']:.1f} to {speed['max']:.1f})  "
            + "  ".join(f"{tier} {count / total:.0%}" for tier, count in hits.items())
        )
        parts = "  ".join(f"{part} {ms:.3f}" for part, ms in test["parts_ms"].items())
        lines.append(f"         ms{'' if name == 'prefill' else ' per token'}: {parts}")
    if "decode" in figures:
        d = figures["decode"]
        share = f"{d['share_of_memory']:.0%} of memory's rate; " if rates["memory"] else ""
        lines.append(
            f"         {d['weight_bytes_per_token'] / 1e6:,.1f} MB of weights a token: {share}"
            f"{d['nvme_bytes_per_token'] / 1e6:,.1f} MB read from the drive"
        )
        if d["contract"]["quality"] != "exact":
            lines.append(_contract_line(d["contract"]))
    reads = figures["reads"]
    if reads["bytes"]:
        lines.append(
            f"reads    {reads['bytes'] / 1e9:.2f} GB, of them ahead "
            f"{reads['prefetch_bytes'] / 1e9:.2f}; on demand "
            f"{reads['demand_bytes_per_s'] / 1e9:.2f} GB/s: "
            f"{reads['demand_share_of_drive']:.0%} of the drive's rate"
        )
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How much is run, and on which tokens."""

    prompt: Annotated[
        int, typer.Option("-p", "--prompt", metavar="N", min=1, help="Tokens of the prompt.")
    ] = 512
    generate: Annotated[
        int, typer.Option("-n", "--generate", metavar="N", min=0, help="Tokens to generate.")
    ] = 128
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", metavar="N", min=1, help="Counted runs.")
    ] = 5
    ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with the token ids to feed.")
    ] = None

    @property
    def tokens(self) -> int:
        """Tokens of a run; the first generated one comes out of the prompt's last pass."""
        return self.prompt + (self.generate + 1 if self.generate else 0)


def bench(
    model: ModelOptions,
    engine: EngineOptions,
    work: Work,
    recording: TraceOptions,
    waterfall: Annotated[
        bool, typer.Option(help="Print where each token's time went, in microseconds.")
    ] = False,
    machine: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the machine's figures for `fomoe plan --machine FILE`: runs a model that "
            "fits, with memory for all experts and, unless budgets are given, shows that run; then "
            "for half.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure prefill and decode: medians, tiers, and shares of the machine's own rates."""
    if machine is not None:
        is_exact = engine.contract.is_exact
        check_target(machine, work.generate, model.device_names(), is_exact=is_exact)
    memory = psutil.virtual_memory()
    all_of = model if machine is None or model.has_budget else part_of(model, 1)
    figures = _measure(all_of, engine, work, recording.trace, waterfall=waterfall)
    if machine is not None:
        plain = dataclasses.replace(engine, prefetch=False)
        limited = _measure(part_of(model, 2), plain, work, None, waterfall=False)
        write_machine(machine, model.path, (figures, limited), memory.available)
    _print(figures, as_json)


def _measure(
    model: ModelOptions, engine: EngineOptions, work: Work, trace: Path | None, *, waterfall: bool
) -> dict[str, Any]:
    """Open the model, run the work and return its figures."""
    engine = dataclasses.replace(engine, ctx_size=max(engine.ctx_size, work.tokens))
    with opened(model, engine, trace=trace) as llm, progress_bar() as progress:
        threads = llm.config.threads or len(os.sched_getaffinity(0))
        read_by = 0 if llm.config.hosts_layers else threads
        rates, sizes = Rates.measured(model.path, read_by), Sizes.of(llm)
        fed = _ids(work.ids, work.tokens, llm.spec.vocab)
        task = progress.add_task("measuring", total=work.repetitions + 1)
        runs, before = [], llm.read_stats()
        for number in range(work.repetitions + 1):
            parts = fed[: work.prompt], fed[work.prompt :]
            runs.append(_run_once(llm, f"bench-{number}", *parts, waterfall))
            progress.advance(task)
        reads = {name: value - before[name] for name, value in llm.read_stats().items()}
    receipts = [receipt for receipt, _ in runs[1:]]
    figures: dict[str, Any] = {
        "model": str(model.path), "isa": ops.isa(), "threads": threads,
        "devices": list(llm.config.devices), "rates": dataclasses.asdict(rates),
        "prefill": _prefill_figures(receipts), "reads": _read_figures(reads, rates),
    }  # fmt: skip
    if work.generate:
        figures["decode"] = _decode_figures(receipts, sizes, rates)
    if waterfall:
        figures["waterfall"] = {"parts": PARTS, "seconds": runs[-1][1]}
    return figures


def _print(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
        return
    for line in _lines(figures):
        typer.echo(line)
    if "waterfall" not in figures:
        return
    typer.echo("token  " + "  ".join(f"{part:>8}" for part in (*PARTS, "wall")))
    for number, parts in enumerate(figures["waterfall"]["seconds"]):
        cells = (f"{1e6 * value:8.0f}" for value in (*parts, sum(parts)))
        typer.echo(f"{number:5}  " + "  ".join(cells))
