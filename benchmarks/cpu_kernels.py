"""Speed of the CPU kernels on weights that lie in memory, beside what the machine reads at all.

Run: python benchmarks/cpu_kernels.py [--threads 2] [--isa avx2] [--types Q4_K,Q6_K] [--rounds 15].
Reading (a plain loop over the same bytes) and kernel run in turns, so that each share is of one
moment and the median of them counts. Per weight type: share of reading for one token and billions
of multiply-adds a second for 1 to 512 tokens; routed experts in two models' shapes; the cost of a
call of the threads. The last line is JSON; --save writes it to benchmarks/results as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.kernels.cpu import ops

COLS = 4096
MATRIX_BYTES = 192 << 20  # several times the largest last-level cache of a desktop
ROWS = 512  # of the matrices that many tokens meet
TOKENS = (1, 4, 16, 64, 512)
FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
RESULTS = Path(__file__).parent / "results"

U8 = npt.NDArray[np.uint8]
Call = Callable[[], object]


@dataclass(frozen=True)
class ExpertCase:
    """Experts of a model: hidden size, width, how many of them, pairs of each in a prompt."""

    name: str
    hidden: int
    width: int
    count: int
    pairs: tuple[int, ...]


EXPERTS = (
    ExpertCase("35B-A3B", 2048, 512, 8, (16, 64)),
    ExpertCase("397B-A17B", 4096, 1024, 10, (10, 40)),
)
EXPERT_TYPES = (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K)


def seconds(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(call: Call, rounds: int) -> float:
    """Seconds of the fastest call after one to warm up."""
    call()
    return min(seconds(call) for _ in range(rounds))


def share_of_reading(call: Call, data: U8, rounds: int) -> dict[str, float]:
    """GB/s of reading and of a call that reads `data` [n] once, at best; their median ratio."""
    pairs = [(seconds(lambda: ops.stream_read(data)), seconds(call)) for _ in range(rounds)]
    read, kernel = np.array(pairs).T
    return {
        "read GB/s": data.nbytes / read.min() / 1e9,
        "GB/s": data.nbytes / kernel.min() / 1e9,
        "share": float(np.median(read / kernel)),
    }


def weights(qtype: GGMLType, rows: int, cols: int = COLS) -> U8:
    """Rows whose bytes are all 0x2c: half floats of 0.07 in every type."""
    return np.full((rows, row_bytes(qtype, cols)), 0x2C, np.uint8)


def product(qtype: GGMLType, w: U8, tokens: int, *, int8: bool) -> Call:
    """A product of `tokens` rows of activations with `w`."""
    x = np.random.default_rng(0).standard_normal((tokens, COLS), dtype=np.float32)
    out = np.empty((tokens, len(w)), np.float32)
    if not int8:
        return lambda: ops.matmul_f32(qtype, w, x, out)
    q, scale = np.empty(x.shape, np.int8), np.empty((tokens, COLS // 32), np.float32)
    ops.quantize_activations(x, q, scale)
    return lambda: ops.matmul_q8(qtype, w, q, scale, out)


def measure_type(qtype: GGMLType, rounds: int) -> dict[str, float]:
    """Speeds of one weight type with the activations that models give it."""
    int8 = qtype not in FLOATS
    large = weights(qtype, MATRIX_BYTES // row_bytes(qtype, COLS))
    result = share_of_reading(product(qtype, large, 1, int8=int8), large.reshape(-1), rounds)
    small = weights(qtype, ROWS)
    for tokens in TOKENS:
        work = tokens * ROWS * COLS / 1e9
        result[f"Gmac/s T={tokens}"] = work / best(product(qtype, small, tokens, int8=int8), rounds)
    return result


def measure_experts(case: ExpertCase, rounds: int) -> dict[str, float]:
    """Decode (one token, `count` of 8 x `count` experts in turn) and prompts, Q4_K, Q4_K, Q6_K."""
    d, f, n = case.hidden, case.width, case.count
    sizes = [
        rows * row_bytes(t, cols)
        for t, rows, cols in zip(EXPERT_TYPES, (f, f, d), (d, d, f), strict=True)
    ]
    data = np.full(8 * n * sum(sizes), 0x2C, np.uint8)
    first = data.ctypes.data + np.arange(8 * n) * sum(sizes)
    table = np.stack([first, first + sizes[0], first + sizes[0] + sizes[1]]).astype(np.uint64)
    one, pairs = np.ones((1, d), np.float32), np.empty((n, d), np.float32)
    start, token = np.arange(n + 1, dtype=np.int32), np.zeros(n, np.int32)
    types = tuple(int(t) for t in EXPERT_TYPES)

    def decode() -> None:
        for i in range(0, 8 * n, n):
            part = np.ascontiguousarray(table[:, i : i + n])
            ops.experts(*part, types, d, f, one, start, token, pairs, exact_activations=False)

    result = share_of_reading(decode, data, rounds)
    for count in case.pairs:
        call = prompt(table[:, :n].copy(), case, types, count)
        work = 3 * n * count * d * f / 1e9
        result[f"Gmac/s pairs={count}"] = work / best(call, rounds)
    return result


def prompt(
    table: npt.NDArray[np.uint64], case: ExpertCase, types: tuple[int, ...], count: int
) -> Call:
    """All experts of `table` on `count` pairs each, added up."""
    n, x = case.count, np.ones((count, case.hidden), np.float32)
    start = (count * np.arange(n + 1)).astype(np.int32)
    token = np.tile(np.arange(count, dtype=np.int32), n)
    weight, out = np.full(n * count, 0.1, np.float32), np.zeros_like(x)
    return lambda: ops.experts_sum(
        *table, types, case.hidden, case.width, x, start, token, weight, out,
        exact_activations=False,
    )  # fmt: skip


def line(name: str, result: dict[str, float]) -> str:
    """One row of the printed table."""
    cells = (f"{k} {v:.2f}" if k == "share" else f"{k} {v:5.1f}" for k, v in result.items())
    return f"{name:10s} " + "  ".join(cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=ops.isa())
    parser.add_argument("--types", default=",".join(t.name for t in GGMLType))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    ops.use_isa(args.isa)
    ops.set_threads(args.threads)
    report = {"isa": args.isa, "threads": args.threads, "machine": machine()}
    print(json.dumps(report))
    report["types"] = types = {}
    for name in args.types.split(","):
        types[name] = measure_type(GGMLType[name], args.rounds)
        print(line(name, types[name]), flush=True)
    report["experts"] = experts = {}
    for case in EXPERTS:
        experts[case.name] = {**asdict(case), **measure_experts(case, args.rounds)}
        print(line(case.name, measure_only(experts[case.name])), flush=True)
    report["call us"] = min(ops.call_seconds(10_000) for _ in range(args.rounds)) * 1e6
    print(f"call of two empty items {report['call us']:.2f} us")
    text = json.dumps(report)
    if args.save:
        day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        RESULTS.mkdir(exist_ok=True)
        name = f"cpu_kernels-{day}-{args.isa}-{args.threads}.json"
        (RESULTS / name).write_text(text + "\n")
    print(text)


def measure_only(result: dict[str, object]) -> dict[str, float]:
    """The figures among the entries of a result."""
    return {k: v for k, v in result.items() if isinstance(v, float)}


def machine() -> str:
    """The processor's name as Linux gives it."""
    for entry in Path("/proc/cpuinfo").read_text().splitlines():
        if entry.startswith("model name"):
            return entry.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
