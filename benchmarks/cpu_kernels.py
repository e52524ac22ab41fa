"""Speed of the CPU kernels on weights that lie in memory, beside what the machine reads at all.

Run: python benchmarks/cpu_kernels.py [--threads 6] [--isa avx2] [--seconds 0.5]. For each weight
type: GB/s of weights for one token with int8 and with float32 activations, and billions of
multiply-adds a second for 64 tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.kernels.cpu import ops

COLS = 4096
MATRIX_BYTES = 192 << 20  # several times the largest last-level cache of a desktop
FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


def best(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, after one to warm up."""
    call()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def weights(qtype: GGMLType, nbytes: int) -> npt.NDArray[np.uint8]:
    """Rows of COLS values whose bytes are all 0x2c: half floats of 0.07 in every type."""
    width = row_bytes(qtype, COLS)
    return np.full((nbytes // width, width), 0x2C, np.uint8)


def read_speed(seconds: float) -> float:
    """GB/s of the threads summing float32 rows: F32 weights, the kernel with the least to do."""
    return measure(GGMLType.F32, seconds)["float32 GB/s"]


def measure(qtype: GGMLType, seconds: float) -> dict[str, float]:
    """Speeds of one weight type."""
    w, few = weights(qtype, MATRIX_BYTES), weights(qtype, 1 << 20)
    x = np.random.default_rng(0).standard_normal((64, COLS), dtype=np.float32)
    q, scale = np.empty(x.shape, np.int8), np.empty((64, COLS // 32), np.float32)
    ops.quantize_activations(x, q, scale)
    one, many = np.empty((1, len(w)), np.float32), np.empty((64, len(few)), np.float32)
    exact = best(lambda: ops.matmul_f32(qtype, w, x[:1], one), seconds)
    speeds = {"float32 GB/s": w.nbytes / exact / 1e9}
    work = many.size * COLS / 1e9
    speeds["float32 Gmac/s"] = work / best(lambda: ops.matmul_f32(qtype, few, x, many), seconds)
    if qtype not in FLOATS:
        fast = best(lambda: ops.matmul_q8(qtype, w, q[:1], scale[:1], one), seconds)
        speeds["int8 GB/s"] = w.nbytes / fast / 1e9
        fast = best(lambda: ops.matmul_q8(qtype, few, q, scale, many), seconds)
        speeds["int8 Gmac/s"] = work / fast
    return speeds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=ops.isa())
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    ops.use_isa(args.isa)
    ops.set_threads(args.threads)
    limit = read_speed(args.seconds)
    print(f"{args.isa}, {args.threads} threads; float32 rows are read at {limit:.1f} GB/s")
    table = {}
    for qtype in GGMLType:
        table[qtype.name] = speeds = measure(qtype, args.seconds)
        cells = (f"{name} {value:6.1f}" for name, value in speeds.items())
        share = max(speeds.get("int8 GB/s", 0.0), speeds["float32 GB/s"]) / limit
        print(f"{qtype.name:8s}", "  ".join(cells), f" {share:4.0%} of reading")
    print(json.dumps({"isa": args.isa, "threads": args.threads, "read": limit, "types": table}))


if __name__ == "__main__":
    main()
