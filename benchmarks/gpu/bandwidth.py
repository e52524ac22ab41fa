"""What a GPU and its bus can do at most: the measure of everything else in this folder.

Run: python benchmarks/gpu/bandwidth.py [--device cuda:0] [--gib 2] [--rounds 10].
Prints JSON. Device copies count bytes read + written, bus copies the bytes that pass. Host times
are Python's, with `time.perf_counter`; device times come from events. All are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from device_time import device_ms, queued_ms, ticks_launch, ticks_per_us

from fomoe.kernels.gpu.gpu import GPU, open_gpu

NODES = (50, 450)  # of the graphs whose difference is the cost of one node
CALLS = 300
SMALL_COPIES = (6 << 20, 64 << 20)  # an expert of the 397B shape, and ten of them


@contextmanager
def device_memory(gpu: GPU, nbytes: int) -> Iterator[int]:
    """Memory beside the arena."""
    address = gpu.runtime.alloc(nbytes)
    try:
        yield address
    finally:
        gpu.runtime.synchronize(gpu.stream)
        gpu.runtime.free(address)


def copy_bandwidth(gpu: GPU, nbytes: int = 1 << 30, rounds: int = 10) -> float:
    """Bytes per second, read + written, of the driver's copy from device memory to the same."""
    with device_memory(gpu, 2 * nbytes) as address:
        gpu.runtime.fill(address, 1, 2 * nbytes, gpu.stream)

        def work() -> None:
            gpu.runtime.copy(address + nbytes, address, nbytes, gpu.stream)

        device_ms(gpu, work, 2)
        return 2 * nbytes / (statistics.median(device_ms(gpu, work, rounds)) * 1e-3)


def bus_bandwidth(gpu: GPU, nbytes: int, rounds: int) -> dict[str, float]:
    """Bytes per second between pinned host memory and the device: each way, both, small ones."""
    runtime = gpu.runtime
    up, down = runtime.pinned(nbytes), runtime.pinned(nbytes)
    up.array[:] = 1
    other, joined = runtime.stream(), runtime.event()
    with device_memory(gpu, 2 * nbytes) as address:

        def to_device(size: int = nbytes) -> None:
            for start in range(0, nbytes // size * size, size):
                runtime.copy(address + start, up.address + start, size, gpu.stream)

        def to_host() -> None:
            runtime.copy(down.address, address + nbytes, nbytes, gpu.stream)

        def both() -> None:
            runtime.record(joined, gpu.stream)
            runtime.wait(joined, other)
            runtime.copy(down.address, address + nbytes, nbytes, other)
            to_device()
            runtime.record(joined, other)
            runtime.wait(joined, gpu.stream)

        def rate(work: Callable[[], None], moved: int = nbytes) -> float:
            device_ms(gpu, work, 1)
            return moved / (statistics.median(device_ms(gpu, work, rounds)) * 1e-3)

        result = {
            "to_device": rate(to_device),
            "to_host": rate(to_host),
            "both_ways": rate(both, 2 * nbytes),
        }
        for size in (s for s in SMALL_COPIES if s <= nbytes):
            key = f"to_device_by_{size >> 20}_MiB"
            result[key] = rate(lambda: to_device(size), nbytes // size * size)  # noqa: B023
    runtime.unpin(up)
    runtime.unpin(down)
    return result


def host_us(work: Callable[[], None], calls: int = CALLS) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def launch_costs(gpu: GPU) -> dict[str, float]:
    """Microseconds of the host per launch, and from a launch to the knowledge of its end."""
    empty, runtime = ticks_launch(gpu, 0), gpu.runtime
    event = runtime.event()

    def launch_and_wait() -> None:
        gpu.launch(empty)
        runtime.synchronize(gpu.stream)

    def launch_and_poll() -> None:
        gpu.launch(empty)
        runtime.record(event, gpu.stream)
        while not runtime.done(event):
            pass

    launch_and_wait()
    only = host_us(lambda: gpu.launch(empty))
    runtime.synchronize(gpu.stream)
    return {
        "launch_us": only,
        "launch_and_synchronize_us": host_us(launch_and_wait),
        "launch_and_event_us": host_us(launch_and_poll),
    }


def graph_costs(gpu: GPU) -> dict[str, float]:
    """Microseconds of a graph of empty kernels, one after the other: of the device per node."""
    runtime, empty = gpu.runtime, ticks_launch(gpu, 0)
    medians, submit = [], 0.0
    for nodes in NODES:
        runtime.begin_capture(gpu.stream)
        for _ in range(nodes):
            gpu.launch(empty)
        graph = runtime.end_capture(gpu.stream)

        def work() -> None:
            runtime.run(graph, gpu.stream)  # noqa: B023

        device_ms(gpu, work, 3)
        medians.append(statistics.median(device_ms(gpu, work, 20)) * 1e3)
        submit = host_us(work, 20)
        runtime.synchronize(gpu.stream)
        runtime.drop(graph)
    node = (medians[1] - medians[0]) / (NODES[1] - NODES[0])
    return {
        "graph_node_us": node,
        "graph_start_us": medians[0] - node * NODES[0],
        "graph_submit_us": submit,
    }


def queue_costs(gpu: GPU, per_us: float, turns: int = 100) -> dict[str, float]:
    """Microseconds of the device from one empty kernel to the next, on one stream and on two."""
    runtime, empty = gpu.runtime, ticks_launch(gpu, 0)
    streams = (gpu.stream, runtime.stream())
    event = runtime.event()

    def in_one() -> None:
        for _ in range(turns):
            gpu.launch(empty)

    def in_turns() -> None:
        for turn in range(turns):
            runtime.launch(empty, streams[turn % 2])
            runtime.record(event, streams[turn % 2])
            runtime.wait(event, streams[(turn + 1) % 2])

    return {
        "next_kernel_us": queued_ms(gpu, in_one, per_us) * 1e3 / turns,
        "kernel_after_event_us": queued_ms(gpu, in_turns, per_us) * 1e3 / turns,
    }


def main() -> None:
    """Measure one device and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    gpu = open_gpu(args.device, 0)
    print(json.dumps(measure(gpu, int(args.gib * 2**30) // 256 * 256, args.rounds), indent=1))
    gpu.close()


def measure(gpu: GPU, nbytes: int, rounds: int) -> dict[str, object]:
    """Everything, by name; bandwidths in bytes per second, times in microseconds."""
    free, total = gpu.runtime.memory()
    per_us = ticks_per_us(gpu)
    return {
        "device": gpu.runtime.name,
        "target": gpu.runtime.target,
        "cores": gpu.runtime.cores,
        "free_bytes": free,
        "total_bytes": total,
        "copied_bytes": nbytes,
        "device_copy": copy_bandwidth(gpu, nbytes, rounds),
        "bus": bus_bandwidth(gpu, min(nbytes, 1 << 30), rounds),
        "launch": launch_costs(gpu),
        "graph": graph_costs(gpu),
        "queue": queue_costs(gpu, per_us),
        "clock_ticks_per_us": per_us,
    }


if __name__ == "__main__":
    main()
