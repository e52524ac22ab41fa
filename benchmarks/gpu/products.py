"""Matrix-vector products and experts of one token as shares of the copy bandwidth, and a tuner.

Run: python benchmarks/gpu/products.py [--device cuda:0] [--mib 600] [--cases q4_k,q6_k,experts]
         [--tune] [--out result.json]
Weights are larger than any cache. Times are medians over replays of a graph, launches included;
shares are bytes of weights a second over those that a copy in the same run reads and writes. Every
result is compared with NumPy float64. With --tune many variants of the kernels run, best first in
the table; else the device's own tuning (fomoe/kernels/gpu/tuning.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bandwidth import copy_bandwidth
from device_time import device_ms
from product_cases import TOLERANCE, ExpertsCase, LayerSizes, MatrixCase, tunings

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.gpu import GPU, open_gpu
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.tuning import Tuning, tuning_of

Case = MatrixCase | ExpertsCase
QUANTS = ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q5_0", "IQ4_XS", "F16", "F32")
LAYER = LayerSizes(hidden=4096, width=1024, shared=1024, top_k=10)
INT8_TOLERANCE = 5e-3  # an int8 that rounds the other way, where float32 and float64 differ


def graph_ms(gpu: GPU, launches: Sequence[Launch], rounds: int) -> float:
    """Median milliseconds of a graph of launches."""
    gpu.runtime.begin_capture(gpu.stream)
    for launch in launches:
        gpu.launch(launch)
    graph = gpu.runtime.end_capture(gpu.stream)

    def work() -> None:
        gpu.runtime.run(graph, gpu.stream)

    device_ms(gpu, work, 2)
    median = statistics.median(device_ms(gpu, work, rounds))
    gpu.runtime.drop(graph)
    return median


def measure(
    gpu: GPU, case: Case, tuning: Tuning | None, copy: float, rounds: int
) -> dict[str, Any]:
    """Return time, share and error of one variant."""
    launches = case.launches(tuning)
    repeats = 4 if isinstance(case, MatrixCase) else 1
    ms = graph_ms(gpu, launches, rounds) / repeats
    error = case.check()
    used = tuning or tuning_of(gpu.runtime)
    return {
        "case": case.name,
        "tuning": asdict(used),
        "us": ms * 1e3,
        "us_per_launch": ms * 1e3 * repeats / len(launches),
        "share": case.nbytes / (ms * 1e-3) / copy,
        "error": error,
    }


def fits(gpu: GPU, launch: Launch, tuning: Tuning) -> bool:
    """Whether as many groups as the tuning wants find room on a core."""
    waves = launch.group[0] // gpu.runtime.wave
    room = gpu.runtime.shared_bytes + 1024
    return waves == tuning.waves and tuning.per_core * (launch.shared + 1024) <= room


def variants(gpu: GPU, case: Case) -> list[Tuning]:
    """The candidates that fit the device, all compiled."""
    jobs: list[tuple[str, dict[str, int]]] = []
    kernel, kept = gpu.kernel, []

    def note(unit: str, name: str, defines: dict[str, int]) -> int:
        jobs.append((unit, defines))
        return 0

    gpu.kernel = note  # type: ignore[method-assign, assignment]
    try:
        for tuning in tunings():
            before = len(jobs)
            try:
                fit = all(fits(gpu, launch, tuning) for launch in case.launches(tuning))
            except DeviceError:
                fit = False
            if fit:
                kept.append(tuning)
            else:
                del jobs[before:]
    finally:
        gpu.kernel = kernel  # type: ignore[method-assign]
    gpu.prepare(jobs)
    return kept


def cases(
    gpu: GPU, names: Sequence[str], nbytes: int, sizes: LayerSizes
) -> list[Callable[[], Case]]:
    """What makes each case; a case holds its weights in the arena."""
    made: list[Callable[[], Case]] = []
    for name in names:
        kind, _, down = name.upper().partition("+")
        if kind == "EXPERTS":
            types = GGMLType.Q4_K, GGMLType[down or "Q6_K"]
            made.append(lambda t=types: ExpertsCase(gpu, sizes, t, nbytes))  # type: ignore[misc]
        else:
            cols = int(down or sizes.hidden)
            made.append(lambda k=GGMLType[kind], c=cols: MatrixCase(gpu, k, c, nbytes))  # type: ignore[misc]
    return made


def run_case(gpu: GPU, case: Case, copy: float, rounds: int, *, tune: bool) -> list[dict[str, Any]]:
    """Measure a case, for experts in parts as well; prints a line each, the best one first."""
    rows: list[dict[str, Any]] = []
    for part in ("both", "in", "out") if isinstance(case, ExpertsCase) else ("",):
        if isinstance(case, ExpertsCase):
            case.part = part
        candidates: list[Tuning | None] = [*variants(gpu, case)] if tune else [None]
        found = [measure(gpu, case, tuning, copy, rounds) for tuning in candidates]
        found.sort(key=lambda row: row["us"])
        for row in found[: 8 if tune else None]:
            print(line_of(row), flush=True)
        bound = INT8_TOLERANCE if part in ("both", "out") else TOLERANCE
        wrong = [row for row in found if not row["error"] < bound]
        for row in wrong:
            print("WRONG", line_of(row), flush=True)
        rows += found
    return rows


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    t = row["tuning"]
    how = f"{t['waves']:2} x {t['per_core']} waves {t['stages']} x {t['tile']} held {t['held']}"
    return (
        f"{row['case']:48} {how}: {row['us']:8.1f} us, {row['us_per_launch']:6.1f} a launch, "
        f"share {row['share']:.3f}, error {row['error']:.1e}"
    )


def main(arguments: Sequence[str] | None = None, sizes: LayerSizes = LAYER) -> list[dict[str, Any]]:
    """Measure one device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--mib", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=15)
    experts = "experts+q6_k,experts+q4_k,experts+q5_k"
    parser.add_argument("--cases", default=",".join((*QUANTS, "Q4_K+8192", experts)))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    begin, nbytes = time.perf_counter(), int(args.mib * 2**20)
    rows: list[dict[str, Any]] = []
    gpu = open_gpu(args.device, 0)
    copy = copy_bandwidth(gpu, max(nbytes, 1 << 20), 10)
    gpu.close()
    print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
    for name in args.cases.split(","):
        gpu = open_gpu(args.device, int(nbytes * 1.3) + (64 << 20))
        for make in cases(gpu, [name], nbytes, sizes):
            rows += run_case(gpu, make(), copy, args.rounds, tune=args.tune)
        gpu.close()
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.out:
        args.out.write_text(json.dumps({"copy": copy, "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
