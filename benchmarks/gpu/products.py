"""Matrix-vector products and experts of one token as shares of the copy bandwidth, and a tuner.

Run: python benchmarks/gpu/products.py [--device cuda:0] [--mib 600] [--cases q4_k,q6_k,experts]
         [--tune] [--out result.json]
With --tune instead many variants of the kernels run over decode layers of two models' sizes, and a
table for fomoe/kernels/gpu/tuning.py is printed in the end (product_tuning.py).
Weights are larger than any cache. Times are medians over replays of a graph, launches included;
shares are bytes of weights a second over those that a copy in the same run reads and writes. Every
result is compared with NumPy float64. The tuning is the device's own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bandwidth import copy_bandwidth
from device_time import graph_ms
from product_cases import TOLERANCE, ExpertsCase, LayerSizes, MatrixCase
from product_tuning import tune

from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.gpu import GPU, open_gpu

Case = MatrixCase | ExpertsCase
QUANTS = ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q5_0", "IQ4_XS", "F16", "F32")
LAYER = LayerSizes(hidden=4096, width=1024, shared=1024, top_k=10)
INT8_TOLERANCE = 5e-3  # an int8 that rounds the other way, where float32 and float64 differ


def measure(gpu: GPU, case: Case, copy: float, rounds: int) -> dict[str, Any]:
    """Return time, share and error of a case."""
    launches = case.launches()
    repeats = 4 if isinstance(case, MatrixCase) else 1
    ms = graph_ms(gpu, launches, rounds) / repeats
    return {
        "case": case.name,
        "us": ms * 1e3,
        "us_per_launch": ms * 1e3 * repeats / len(launches),
        "share": case.nbytes / (ms * 1e-3) / copy,
        "error": case.check(),
    }


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


def run_case(gpu: GPU, case: Case, copy: float, rounds: int) -> list[dict[str, Any]]:
    """Measure a case, for experts in parts as well; prints a line each."""
    rows: list[dict[str, Any]] = []
    for part in ("both", "in", "out") if isinstance(case, ExpertsCase) else ("",):
        if isinstance(case, ExpertsCase):
            case.part = part
        row = measure(gpu, case, copy, rounds)
        bound = INT8_TOLERANCE if part in ("both", "out") else TOLERANCE
        print("" if row["error"] < bound else "WRONG ", line_of(row), sep="", flush=True)
        rows.append(row)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['case']:48} {row['us']:8.1f} us, {row['us_per_launch']:6.1f} a launch, "
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
    if args.tune:
        tune(args.device, nbytes, copy)
    for name in () if args.tune else args.cases.split(","):
        gpu = open_gpu(args.device, int(nbytes * 1.3) + (64 << 20))
        for make in cases(gpu, [name], nbytes, sizes):
            rows += run_case(gpu, make(), copy, args.rounds)
        gpu.close()
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.out:
        args.out.write_text(json.dumps({"copy": copy, "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
