"""Round trip of a 16 KB message between two processes: shared memory and TCP on loopback.

Run: python benchmarks/channel.py [--rounds 5000]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection as Pipe
from typing import Any

from fomoe.actors.channel import (
    Endpoint,
    Fabric,
    FabricSpec,
    Listener,
    Receiver,
    connect,
    open_fabric,
)
from fomoe.errors import PeerDeadError

SPEC = FabricSpec(("a", "b"), (("a", "b"), ("b", "a")))
NBYTES = 16384
CASES = {"shared memory, spin": ("A", 500), "shared memory, sleep": ("A", 0), "tcp": ("B", 500)}


def receive(fabric: Fabric, receiver: Receiver, buffer: bytearray, spin_us: float) -> None:
    while True:
        bell = fabric.bell()
        if receiver.try_recv(buffer) is not None:
            return
        fabric.wait(bell, spin_us, 1000)


def meet(pipe: Pipe, me: str, box: str, offers: list[dict[str, Any]]) -> Fabric:
    fabric = open_fabric(SPEC, me, box, [Endpoint.from_dict(offer) for offer in offers], "tcp")
    listener = Listener()
    mine = listener.endpoint(fabric, box)
    pipe.send(mine.to_dict())
    connect(fabric, listener, [mine, Endpoint.from_dict(pipe.recv())], "tcp")
    return fabric


def echo(pipe: Pipe, box: str, spin_us: float) -> None:
    fabric = meet(pipe, "b", box, [pipe.recv()])
    buffer = bytearray(NBYTES)
    sender, receiver = fabric.sender("a"), fabric.receiver("a")
    with contextlib.suppress(PeerDeadError):
        while True:
            receive(fabric, receiver, buffer, spin_us)
            sender.send(1, buffer)
    fabric.close()


def measure(box: str, spin_us: float, rounds: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=echo, args=(theirs, box, spin_us))
    child.start()
    fabric = Fabric.create(SPEC, "a")
    listener = Listener()
    mine = listener.endpoint(fabric, "A")
    pipe.send(mine.to_dict())
    pipe.send(mine.to_dict())
    connect(fabric, listener, [mine, Endpoint.from_dict(pipe.recv())], "tcp")
    sender, receiver, buffer = fabric.sender("b"), fabric.receiver("b"), bytearray(NBYTES)
    times = []
    for _ in range(rounds + rounds // 10):
        start = time.perf_counter()
        sender.send(0, buffer)
        receive(fabric, receiver, buffer, spin_us)
        times.append((time.perf_counter() - start) * 1e6)
    times = times[rounds // 10 :]  # the first ones touch the pages
    fabric.close()
    child.join(5)
    return {
        "p50_us": round(statistics.median(times), 1),
        "p99_us": round(statistics.quantiles(times, n=100)[98], 1),
        "min_us": round(min(times), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5000)
    rounds = parser.parse_args().rounds
    results = {name: measure(box, spin, rounds) for name, (box, spin) in CASES.items()}
    for name, result in results.items():
        print(f"{name:22} p50 {result['p50_us']:8.1f} us   p99 {result['p99_us']:8.1f} us")
    print(json.dumps({"bytes": NBYTES, "rounds": rounds, "round_trip": results}))


if __name__ == "__main__":
    main()
