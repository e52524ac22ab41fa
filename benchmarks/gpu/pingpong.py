"""Two actors in turn on one GPU, a part of the experts in VRAM, the rest in RAM: what overlaps.

Run: python benchmarks/gpu/pingpong.py --model bench/397b-a17b-4l.gguf [--cpu-arm auto]
    [--out r.json]

Engines of child processes, without Ray. The same text goes through engines with all experts in
VRAM (compute alone) and with slots such that about `--hit` of its activations find theirs there;
the rest lies in RAM, all of it. Copy alone is the time of the bytes that crossed the link, at the
rate of plain copies of experts out of the same memory. Then the same with a kernel added to each
layer that makes compute as long as copies. Hidden is (compute + copy - wall) / copy. `one` is one
actor with both budgets: it pays no turns. With `--cpu-arm` the same slots once more with some of
the experts in RAM computed there, which brings nothing ahead, and without both. With --attention
driver the driver's process has all but the experts, and no kernel is added; give the --share that
the run without it found. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pingpong_trace import Call, lines

from fomoe.actors import processes
from fomoe.config import Attention, EngineConfig, RoutingConfig
from fomoe.engine.hosting import dense_bytes
from fomoe.engine.requests import GenerateRequest, Receipt, SamplingParams, TokenEvent
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.llm import LLM
from fomoe.model.archs import read_spec

BY_LAYER = "price=0.000001"  # a contract that decides, and changes nothing where all is resident
SKIP = 16  # tokens that are not timed
FIRST = 3  # id of the text's first token
CHUNK, CTX = 32, 4096
TRIES, WARM_UPS = 3, 6
CALL_S = 60.0


@dataclass(frozen=True)
class Facts:
    """What budgets are made of: bytes of a device's dense part and of all its experts, layers."""

    dense: int
    experts: int
    layers: int


def facts_of(model: Path, devices: tuple[str, ...], attention: Attention) -> Facts:
    """Read what `budget` wants."""
    file = open_gguf(model)
    spec = read_spec(file)
    config = EngineConfig(
        model=model, devices=devices, ctx_size=CTX, prefill_chunk=CHUNK, attention=attention,
        routing=RoutingConfig(shadow_every=0),
    )  # fmt: skip
    table = ExpertTable.from_gguf(file, spec.n_layers)
    n_devices = len(devices)
    whole = max(
        sum(table.slot_bytes(i) for i in range(d, spec.n_layers, n_devices))
        for d in range(n_devices)
    )
    return Facts(max(dense_bytes(file, spec, config)), whole * spec.moe.n_experts, spec.n_layers)


@contextmanager
def engine(
    args: argparse.Namespace, n_devices: int, share: float, cpu_arm: str = "off"
) -> Iterator[LLM]:
    """An engine whose devices hold a share of their experts."""
    given = args.device.split(",")
    devices = tuple(given[i % len(given)] for i in range(n_devices))
    facts = facts_of(args.model, devices, args.attention)
    start = time.perf_counter()
    with LLM(
        args.model, devices=list(devices), ctx_size=CTX, prefill_chunk=CHUNK,
        vram_budget=facts.dense + int(share * facts.experts) + (1 << 20),
        ram_budget=args.ram, ram_policy=args.ram_policy, prefetch_budget=args.prefetch_budget,
        routing=RoutingConfig(shadow_every=0), launcher="processes", cpu_arm=cpu_arm,
        attention=args.attention,
    ) as llm:  # fmt: skip
        print(f"{n_devices} actor(s), {share:.0%} in VRAM, up in "
              f"{time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip
        yield llm


def say(llm: LLM, what: str, *args: Any) -> list[Any]:
    """Call a method of every device's actor."""
    handles = llm.engine.running.handles
    names = sorted(name for name in handles if name.startswith("gpu-"))
    return [handles[name].call(what, *args).result(CALL_S) for name in names]


@dataclass(frozen=True)
class Run:
    """Milliseconds a token, mean and median of all timed ones, and the receipt."""

    ms: float
    median_ms: float
    receipt: Receipt


def text(llm: LLM, tokens: int, quality: str | None = None) -> Run:
    """Run the text that the file is made for, consecutive ids, whose routing has real locality.

    Its prompt is one token, which goes through the layers as the others do. The tokens are given,
    so that nothing is drawn from the vocabulary.
    """
    count = SKIP + tokens
    request = GenerateRequest(
        request_id=f"bench-{time.monotonic_ns()}", prompt=[FIRST], max_tokens=count,
        forced=list(range(FIRST + 1, FIRST + 1 + count)),
        sampling=SamplingParams(temperature=0.0), quality=quality,
    )  # fmt: skip
    at: list[float] = []
    receipt = None
    for event in llm.engine.stream(request):
        if isinstance(event, TokenEvent):
            at.append(time.perf_counter())
        else:
            receipt = getattr(event, "receipt", receipt)
            if getattr(event, "error", None):
                raise SystemExit(event.error)
    assert receipt is not None
    times = [1e3 * (b - a) for a, b in zip(at[SKIP:], at[SKIP + 1 :], strict=False)]
    return Run(statistics.mean(times), statistics.median(times), receipt)


def traced(args: argparse.Namespace, llm: LLM, name: str, quality: str | None = None) -> None:
    """Write what actors did during two tokens of the text, where that is asked for."""
    if args.trace is None:
        return
    handles = llm.engine.running.handles
    actors = [h for key, h in sorted(handles.items()) if key == "driver" or key.startswith("gpu-")]
    for handle in actors:
        handle.call("trace").result(CALL_S)
    text(llm, 16, quality)
    calls = [Call(*c) for handle in actors for c in handle.call("trace").result(CALL_S)]
    loads = [c.what.split()[-1] for c in calls if c.what.startswith("load")]
    print(f"  loads of steps {loads.count('step')}, ahead {loads.count('ahead')}", flush=True)
    (args.trace / f"{name}.txt").write_text("\n".join(lines(calls, 2)) + "\n")


def alone(args: argparse.Namespace, n_devices: int) -> dict[str, Any]:
    """Time the text where nothing has to be copied."""
    with engine(args, n_devices, 1.0) as llm:
        text(llm, 8, BY_LAYER)
        run = text(llm, args.tokens, BY_LAYER)
        found = {"ms": run.ms, "hash": run.receipt.decision_hash}
        if n_devices == 1 and args.attention == "device":
            found["device ms"] = say(llm, "time_token", 100)[0]
            found["host us per layer"] = 1e3 * (run.ms - found["device ms"]) / llm.spec.n_layers
        traced(args, llm, f"alone-{n_devices}", BY_LAYER)
        return found


def warm_up(args: argparse.Namespace, llm: LLM) -> None:
    """Run the text until nothing of it is read from the drive: what VRAM held first is in RAM."""
    for _ in range(WARM_UPS):
        if text(llm, args.tokens).receipt.nvme_bytes == 0:
            return
    print("  experts are still read from the drive", flush=True)


def hit_share(receipt: Receipt) -> float:
    """Return the activations of decode steps whose experts lay in VRAM."""
    total = receipt.hits_device + receipt.hits_ram + receipt.reads_nvme
    return receipt.hits_device / max(1, total)


def tiered(args: argparse.Namespace, n_devices: int, compute: float, share: float | None) -> Any:
    """Time the text over tiers, plain and delayed; `share` None looks for the wanted hits."""
    guess, known = share or args.share, []
    for attempt in range(1 if share else TRIES):
        with engine(args, n_devices, guess) as llm:
            warm_up(args, llm)
            run = text(llm, args.tokens)
            hits = hit_share(run.receipt)
            known.append((guess, hits))
            print(f"  {hits:.1%} of activations in VRAM, {run.ms:.3f} ms a token", flush=True)
            if share or abs(hits - args.hit) < 0.05 or attempt == TRIES - 1:
                return guess, measured(args, llm, compute, run)
        guess = next_guess(known, args.hit)
    raise AssertionError


def next_guess(known: list[tuple[float, float]], wanted: float) -> float:
    """Return the share of slots that should give the wanted share of hits."""
    (x1, y1), (x0, y0) = known[-1], (known[-2] if len(known) > 1 else (0.0, 0.0))
    slope = (y1 - y0) / (x1 - x0) if x1 != x0 and y1 != y0 else 1.0
    return min(0.95, max(0.05, x1 + (wanted - y1) / slope))


def measured(args: argparse.Namespace, llm: LLM, compute: float, run: Run) -> dict[str, Any]:
    """Return the figures of a run, those with delays, and the link's own rate."""
    layers, delays = llm.spec.n_layers, {"plain": (compute, run)}
    n_devices = len(llm.config.devices)
    traced(args, llm, f"plain-{n_devices}")
    crossed = bytes_per_token(run.receipt, args.tokens)
    guess_ms = 1e3 * crossed / args.link
    extra_us = max(0.0, 1e3 * (guess_ms - compute) / layers)
    if extra_us and args.attention == "device":
        say(llm, "delay", extra_us)
        delays["delayed"] = (compute + extra_us * layers / 1e3, text(llm, args.tokens))
        traced(args, llm, f"delayed-{n_devices}")
        say(llm, "delay", 0.0)
    rate = say(llm, "link_rate")[0]
    found: dict[str, Any] = {
        "hits in VRAM": round(hit_share(run.receipt), 4), "link GB/s": round(rate / 1e9, 2),
    }  # fmt: skip
    for name, (alone_ms, timed) in delays.items():
        ms, receipt = timed.ms, timed.receipt
        copy = 1e3 * bytes_per_token(receipt, args.tokens) / rate
        found[name] = {
            "wall ms": round(ms, 4), "median ms": round(timed.median_ms, 4),
            "compute ms": round(alone_ms, 4), "copy ms": round(copy, 4),
            "wall / max": round(ms / max(alone_ms, copy), 4),
            "hidden": round((alone_ms + copy - ms) / copy, 4) if copy else None,
            "MB per token": round(bytes_per_token(receipt, args.tokens) / 1e6, 2),
            "hash": receipt.decision_hash,
            "guesses": receipt.prefetched, "came true": receipt.prefetched_used,
            "stalled ms": round(receipt.stall_ms / (SKIP + args.tokens), 4),
        }  # fmt: skip
        print(f"  {name}: {found[name]}", flush=True)
    return found


def armed(args: argparse.Namespace, n_devices: int, share: float) -> dict[str, Any]:
    """Return figures of the same slots with an arm, and with neither an arm nor a look ahead."""
    found: dict[str, Any] = {}
    for name, cpu_arm in (("nothing ahead", "off"), ("arm", args.cpu_arm)):
        with engine(args, n_devices, share, cpu_arm) as llm:
            handles = llm.engine.running.handles
            handles["driver"].call("reach", 0).result(CALL_S)
            text(llm, 64)
            run = text(llm, args.tokens)
            receipt, tokens = run.receipt, SKIP + args.tokens
            found[name] = {
                "wall ms": round(run.ms, 4), "table": receipt.cpu_arm,
                "in RAM per token": round(receipt.computed_in_ram / tokens, 2),
                "MB per token": round(bytes_per_token(receipt, args.tokens) / 1e6, 2),
                "hits in VRAM": round(hit_share(receipt), 4), "hash": receipt.decision_hash,
                "stalled ms": round(receipt.stall_ms / tokens, 4),
            }  # fmt: skip
            if cpu_arm != "off":  # these overwrite slots: nothing is run behind them
                storage = handles["storage-0"]
                counters = storage.call("stats").result(CALL_S)
                one_us = 1e6 * counters["arm_compute_s"] / max(1, counters["arm_experts"])
                found[name]["processor us per expert"] = round(one_us, 1)
                pairs = say(llm, "arm_costs")
                found[name]["costs us"] = {
                    "copy, gpu": [[round(1e6 * s, 1) for s in pair] for pair in pairs],
                    "processor": round(1e6 * storage.call("arm_cost").result(CALL_S), 1),
                }  # fmt: skip
        print(f"  {name}: {found[name]}", flush=True)
    return found


def bytes_per_token(receipt: Receipt, tokens: int) -> float:
    """Return what crossed the link towards the device for a token of the answer."""
    return receipt.ram_bytes / (SKIP + tokens)


def main() -> None:
    """Time engines of two actors and of one; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0", help="or one for each actor: cuda:0,cuda:1")
    parser.add_argument("--ram", default="40GiB", help="RAM budget; all experts are to fit")
    parser.add_argument("--ram-policy", default="inclusive", choices=("inclusive", "exclusive"))
    parser.add_argument("--hit", type=float, default=0.6)
    parser.add_argument("--share", type=float, default=0.1, help="of the slots, to begin with")
    parser.add_argument("--link", type=float, default=54e9, help="bytes a second, for the delay")
    parser.add_argument("--prefetch-budget", type=float, default=1.0)
    parser.add_argument("--cpu-arm", default="off", help="off, auto, or a table: '0 0 1 1 2 ...'")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--only", choices=("one", "two"), help="actors; both if absent")
    parser.add_argument("--attention", default="device", choices=("device", "driver"))
    parser.add_argument("--trace", type=Path, help="folder for what actors did, call by call")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.model, out = args.model.resolve(), args.out and args.out.resolve()
    args.trace = args.trace and args.trace.resolve()
    os.chdir(Path(__file__).parent)  # where the actors' processes find their class
    processes.CLASSES["layers"] = "pingpong_actor:PingPongActor"
    if args.trace:
        processes.CLASSES["driver"] = "pingpong_trace:TracedDriver"
    result: dict[str, Any] = {"model": args.model.name, "tokens": args.tokens}
    share = None
    for name, n_devices in (("two", 2), ("one", 1)):
        if args.only not in (None, name):
            continue
        compute = alone(args, n_devices)
        print(f"  alone: {compute}", flush=True)
        share, found = tiered(args, n_devices, compute["ms"], share)
        result[name] = {"alone": compute, "slots": round(share, 4), **found}
        if args.cpu_arm != "off":
            result[name]["cpu arm"] = armed(args, n_devices, share)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
