"""What a driver of GPUs offers; `hip.py` and `cuda.py` have this shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.launch import Launch

U8 = npt.NDArray[np.uint8]
WAIT_S = 120.0  # the longest that one stream's work may take
_SPIN_S = 0.005
_PAUSE_S = 0.0001


@dataclass(frozen=True, slots=True)
class Pinned:
    """Host memory that the device reads and writes: as an address here, there, and as bytes."""

    address: int
    device_address: int
    array: U8


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured sequence of work, ready to be run again; `handle` is the driver's."""

    handle: Any


class Runtime(Protocol):
    """One device of one driver. Addresses, streams, events and functions are plain ints.

    The thread that opened it may call it; another one calls `attach` first. Every method raises
    DeviceError with the driver's word for what went wrong.
    """

    name: str  # "hip:0", "cuda:1"
    target: str  # what compilers call the device: "gfx1200", "sm_90"
    wave: int  # lanes that run in step: 32 or 64
    cores: int  # compute units or multiprocessors
    shared_bytes: int  # shared memory that one group may ask for

    def attach(self) -> None:
        """Make the calling thread use this device."""

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""

    def alloc(self, nbytes: int) -> int:
        """Return the address of new device memory, 256-byte aligned."""

    def free(self, address: int) -> None:
        """Give back what `alloc` returned."""

    def pinned(self, nbytes: int) -> Pinned:
        """Return new pinned host memory, which stands until `unpin` or `close`."""

    def unpin(self, pinned: Pinned) -> None:
        """Give back what `pinned` returned; its array may not be touched again."""

    def register(self, array: U8) -> int:
        """Pin host memory that exists, page by page, and return its device address."""

    def unregister(self, array: U8) -> None:
        """Undo `register`."""

    def stream(self) -> int:
        """Return a new queue of work; queues run beside each other."""

    def event(self, timing: bool = False) -> int:
        """Return a new event; with `timing`, one for `elapsed_ms`."""

    def record(self, event: int, stream: int) -> None:
        """Make the event happen when the stream's work so far is done."""

    def wait(self, event: int, stream: int) -> None:
        """Hold the stream's further work until the event's latest record has happened."""

    def done(self, event: int) -> bool:
        """Whether the event's latest record has happened."""

    def synchronize(self, stream: int, within_s: float = WAIT_S) -> None:
        """Wait for the stream's work; DeviceError when it takes longer than `within_s`."""

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the milliseconds between two timing events that have happened."""

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two addresses, host or device, in the stream's order."""

    def fill(self, to: int, byte: int, nbytes: int, stream: int) -> None:
        """Set device memory to a byte, in the stream's order."""

    def load(self, image: bytes) -> Any:
        """Return the module of compiled code."""

    def function(self, module: Any, name: str) -> int:
        """Return the kernel of that name."""

    def launch(self, launch: Launch, stream: int) -> None:
        """Put a kernel into the stream."""

    def begin_capture(self, stream: int) -> None:
        """Record what is put into the stream from now on, instead of running it."""

    def end_capture(self, stream: int) -> Graph:
        """Return what was recorded since `begin_capture`."""

    def run(self, graph: Graph, stream: int) -> None:
        """Put a graph into the stream."""

    def drop(self, graph: Graph) -> None:
        """Free a graph that does not run."""

    def close(self) -> None:
        """Free streams, events, graphs, modules and pinned memory, after all work.

        Arrays of `pinned` may not be touched again. Memory from `alloc` is its owner's to free.
        """


def poll(ready: Callable[[], bool], within_s: float, what: str) -> None:
    """Call `ready` until it is true: at full speed at first, then ten thousand times a second.

    Raises:
        DeviceError: it is not true after `within_s` seconds.
    """
    start = time.monotonic()
    while not ready():
        waited = time.monotonic() - start
        if waited > within_s:
            raise DeviceError(f"{what} has not ended after {waited:.0f} s; the device hangs")
        if waited > _SPIN_S:
            time.sleep(_PAUSE_S)
