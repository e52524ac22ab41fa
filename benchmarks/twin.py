"""The twin beside fomoe itself on this machine: predicted and measured tokens per second, in pairs.

    python benchmarks/twin.py MODEL.gguf --vram 1GB [--kernels OTHER.gguf] [--pairs 5] [--json FILE]

Three engines are open: two do what `fomoe bench --machine` does, with all and with half of the
experts of a model resident (MODEL, or a smaller one of the same kinds of quants where MODEL does
not fit), the third runs MODEL in limited memory. They run in turns, with the drive measured around
the third, so that all see the same company on the machine. Which experts a run wants is recorded
from the model itself; the twin gets only that, the budgets, and the first two engines' figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from synthetic.verify import trace
from versus.quiet import Others

from fomoe.cli.bench import Rates, Sizes, _decode_figures, _prefill_figures, _run_once
from fomoe.cli.machine_file import measurements, part_of
from fomoe.cli.options import ModelOptions
from fomoe.gguf.extents import ExpertTable
from fomoe.llm import LLM
from fomoe.residency import LFRU
from fomoe.sim.decode import decode
from fomoe.sim.loads import Cache, Loads, Replay, assumed_loads, replay_ids
from fomoe.sim.measured import machine_of
from fomoe.sim.schedule import Schedule
from fomoe.sim.shapes import shape_of
from fomoe.storage.rates import expert_read_times
from fomoe.storage.reader import DirectReader


def main() -> None:
    options = _options()
    tokens = list(range(options.first, options.first + options.prompt + options.decode + 1))
    limited: dict[str, Any] = {
        "devices": ["cpu"] * options.devices, "vram_budget": options.vram,
        "ram_budget": options.ram, "prefetch": options.prefetch,
    }  # fmt: skip
    ids = np.sort(trace(options.model, tokens, threads=2)[0][:-1])
    with ExitStack() as stack:
        kernels = options.kernels or options.model
        half = part_of(ModelOptions(model=kernels, devices=",".join(limited["devices"])), 2)
        budgets = [(None, None), (half.vram_budget, 0)][: 1 if options.no_half else 2]
        known = []
        for vram, ram in budgets:
            of = limited | {"vram_budget": vram, "ram_budget": ram, "prefetch": False}
            known.append(stack.enter_context(_open(kernels, len(tokens), of)))
        small = stack.enter_context(_open(options.model, len(tokens), limited))
        loads = _replayed(small, ids, options.prompt)
        pairs = []
        for number in range(options.pairs):
            pairs.append(_pair(number, known, small, tokens, loads, options))
            _print(number, pairs[-1])
    _summary(pairs, loads)
    if options.json:
        options.json.write_text(json.dumps({"options": _plain(vars(options)), "pairs": pairs}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--kernels", type=Path, help="the model that gives the rates of kernels")
    parser.add_argument("--vram", required=True, help="of each device, e.g. 1GB")
    parser.add_argument("--ram", default="0")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--prefetch", action="store_true")
    parser.add_argument("--first", type=int, default=64, help="first token id of the text")
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--no-half", action="store_true", help="two engines only, to save memory")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _open(path: Path, ctx: int, settings: dict[str, Any]) -> LLM:
    settings = {"devices": ["cpu"], "prefetch": False} | settings
    return LLM(path, address="local", ctx_size=max(256, ctx), threads=2, **settings)


def _replayed(llm: LLM, ids: np.ndarray[Any, Any], prompt: int) -> Loads:
    """Replay the recorded experts through a residency of the slots that the engine has."""
    topology = llm.engine.plan.topology
    layers = topology.n_layers
    cache = Cache(
        device_slots=sum(topology.device_slots.values()) / layers,
        ram_slots=sum(topology.ram_slots.values()) / layers,
        policy=LFRU(),
    )
    replay = Replay(top_k=ids.shape[2], warmup=prompt, devices=1, layers=layers)
    return replay_ids(ids.astype(np.int32), topology.n_experts, cache, replay)


def _figures(llm: LLM, name: str, prompt: list[int], forced: list[int]) -> dict[str, Any]:
    receipt, _ = _run_once(llm, name, prompt, forced, False)
    return {
        "model": str(llm.config.model), "devices": list(llm.config.devices),
        "rates": asdict(Rates(1e9, 0.0)), "prefill": _prefill_figures([receipt]),
        "decode": _decode_figures([receipt], Sizes.of(llm), Rates(1e9, 1.0)),
    }  # fmt: skip


def _pair(
    number: int, known: list[LLM], small: LLM, tokens: list[int], loads: Loads,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    others = Others(psutil.Process().pid)
    parts = tokens[: options.prompt], tokens[options.prompt :]

    def figures(llm: LLM, when: str) -> dict[str, Any]:
        return _figures(llm, f"{when}-{number}", *parts)

    before, reads = [figures(llm, f"before{i}") for i, llm in enumerate(known)], [_drive(known[0])]
    measured = figures(small, "small")
    reads.append(_drive(known[0]))
    after = [figures(llm, f"after{i}") for i, llm in enumerate(known)]
    kernels = shape_of(known[0].file, known[0].spec)
    free = float(psutil.virtual_memory().available)
    machines = [
        machine_of(measurements((runs[0], runs[1] if runs[1:] else None), kernels, read, free))
        for runs, read in zip((before, after), reads, strict=True)
    ]
    shape = shape_of(small.file, small.spec)
    hits = measured["decode"]["hits"]
    total = sum(hits.values())
    as_met = assumed_loads(
        (hits["device"] / total, hits["ram"] / total, hits["nvme"] / total),
        shape.top_k, shape.n_layers, 200, seed=number,
    )  # fmt: skip
    speed = measured["decode"]["tokens_per_s"]["median"]
    schedules = {"mid": Schedule(recall=0.5 if options.prefetch else 0.0)}
    if options.prefetch:
        schedules |= {"low": Schedule(recall=0.1), "high": Schedule(recall=0.85)}

    def predict(what: Loads) -> dict[str, float]:
        """The middle between both machines, and the ends over machines and schedules."""
        walls = {
            name: [1 / decode(m, shape, what, schedule).tokens_per_s for m in machines]
            for name, schedule in schedules.items()
        }
        every = [wall for of in walls.values() for wall in of]
        return {"low": 1 / max(every), "mid": 1 / statistics.mean(walls["mid"]),
                "high": 1 / min(every)}  # fmt: skip

    return {
        "measured": speed,
        "predicted": predict(loads),
        "predicted_with_met_hits": predict(as_met),
        "hits": {tier: n / total for tier, n in hits.items()},
        "parts_ms": measured["decode"]["parts_ms"],
        "known_parts_ms": [f["decode"]["parts_ms"] for f in (*before, *after)],
        "known_tokens_per_s": [
            f["decode"]["tokens_per_s"]["median"] for f in (*before, *after)
        ],
        "reads_s": [m.software.reads_s for m in machines],
        "drive": reads,
        "others_cores": others.cores(),
    }  # fmt: skip


def _drive(llm: LLM) -> tuple[float, float]:
    table = ExpertTable.from_gguf(llm.file, llm.spec.n_layers)
    with DirectReader(llm.file.shards, table) as reader:
        return expert_read_times(reader)


def _print(number: int, pair: dict[str, Any]) -> None:
    said, met = (
        "predicted {mid:.2f} ({low:.2f} to {high:.2f})".format(**pair[key])
        for key in ("predicted", "predicted_with_met_hits")
    )
    shares = "  ".join(f"{tier} {share:.0%}" for tier, share in pair["hits"].items())
    print(
        f"pair {number}: measured {pair['measured']:.2f} tok/s ({shares}); {said}; with the hits "
        f"that it met {met}; "
        f"an expert's read {1e3 * pair['drive'][0][0]:.2f} and {1e3 * pair['drive'][1][0]:.2f} ms; "
        f"others used {pair['others_cores']:.2f} cores",
        flush=True,
    )


def _summary(pairs: list[dict[str, Any]], loads: Loads) -> None:
    shares = "  ".join(f"{share:.0%}" for share in loads.shares)
    print(
        f"predicted hits (device, RAM, NVMe): {shares}; no range: text and slots are the run's own"
    )
    for name, ratios in _ratios(pairs):
        ordered = sorted(ratios)
        print(
            f"{name} over measured: median {statistics.median(ordered):.3f} "
            f"({ordered[0]:.3f} to {ordered[-1]:.3f}) of {len(ordered)} pairs"
        )


def _ratios(pairs: list[dict[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    for key, text in (("predicted", "predicted"), ("predicted_with_met_hits", "with met hits")):
        for end in ("low", "mid", "high"):
            yield f"{text} ({end})", [p[key][end] / p["measured"] for p in pairs]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}


if __name__ == "__main__":
    main()
