"""How long something small waits behind experts on their way: as a copy, and as a kernel.

Run: python benchmarks/gpu/behind_copies.py [--device cuda:0]

Copies of an expert's size are queued on one stream, then 16 KiB from the host on another one, which
is timed on the device. The last line is JSON, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

from fomoe.kernels.gpu.bring import bring
from fomoe.kernels.gpu.gpu import GPU, open_gpu

SMALL, TRIES = 16 << 10, 30


def waited_us(gpu: GPU, experts: tuple[int, int, int, int], small: Callable[[], None]) -> float:
    """Return the median until `small` has ended; `experts` are to, from, bytes and how many."""
    runtime, beside = gpu.runtime, gpu.runtime.stream()
    begin, end = runtime.event(timing=True), runtime.event(timing=True)
    to, source, nbytes, count = experts
    times = []
    for _ in range(TRIES):
        for _ in range(count):
            runtime.copy(to, source, nbytes, beside)
        runtime.record(begin, gpu.stream)
        small()
        runtime.record(end, gpu.stream)
        runtime.synchronize(gpu.stream)
        runtime.synchronize(beside)
        times.append(1e3 * runtime.elapsed_ms(begin, end))
    return statistics.median(times)


def main() -> None:
    """Time both behind 0, 3, 6 and 12 parts of experts; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--bytes", type=int, default=2_360_000, help="of an expert's part")
    args = parser.parse_args()
    nbytes = args.bytes // 4 * 4
    gpu = open_gpu(args.device, nbytes + (1 << 20))
    try:
        runtime = gpu.runtime
        source, few = runtime.pinned(nbytes), runtime.pinned(SMALL)
        to, here = gpu.arena.take(nbytes), gpu.arena.take(SMALL)
        launch = bring(gpu, here, few.device_address, SMALL)
        ways: dict[str, Callable[[], None]] = {
            "copy": lambda: runtime.copy(here, few.address, SMALL, gpu.stream),
            "kernel": lambda: gpu.launch(launch),
        }
        found = {
            f"{name} behind {count}": round(
                waited_us(gpu, (to, source.address, nbytes, count), small), 1
            )
            for count in (0, 3, 6, 12)
            for name, small in ways.items()
        }
        print(json.dumps(found))
    finally:
        gpu.close()


if __name__ == "__main__":
    main()
