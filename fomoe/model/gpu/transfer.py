"""Arrays that both sides see, and bounded waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.gpu.bring import bring
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.runtime import poll


class Mirror:
    """An array in device memory (at `address`, where it is there) with a twin in pinned memory.

    Attributes:
        address: of the device's part.
        host: the twin; a copy that is under way reads or writes it. It ends with
            the device.
    """

    def __init__(
        self, gpu: GPU, shape: tuple[int, ...], dtype: npt.DTypeLike, address: int = 0
    ) -> None:
        kind = np.dtype(dtype)
        self._gpu = gpu
        self._nbytes = int(np.prod(shape)) * kind.itemsize
        self._pinned = gpu.runtime.pinned(self._nbytes)
        self.address = address or gpu.arena.take(self._nbytes)
        self.host: npt.NDArray[Any] = self._pinned.array[: self._nbytes].view(kind).reshape(shape)
        self.host[...] = np.zeros((), kind)

    def send(self, start: int = 0, nbytes: int | None = None) -> None:
        """Queue a copy of bytes `start` and on from the host to the device."""
        self._copy(self.address, self._pinned.address, start, nbytes)

    def bring(self, gpu: GPU, start: int = 0, nbytes: int | None = None) -> Launch:
        """Return the launch that does what `send` does, past copies that are under way."""
        count = self._nbytes - start if nbytes is None else nbytes
        return bring(gpu, self.address + start, self._pinned.device_address + start, count)

    def fetch(self, start: int = 0, nbytes: int | None = None) -> None:
        """Queue a copy of bytes `start` and on from the device to the host."""
        self._copy(self._pinned.address, self.address, start, nbytes)

    def giving(self, gpu: GPU, nbytes: int | None = None) -> Callable[[], None]:
        """Return what queues a `fetch` of the first bytes as a kernel.

        In a graph a copy starts some microseconds later than a kernel does.
        """
        count = self._nbytes if nbytes is None else nbytes
        return partial(gpu.launch, bring(gpu, self._pinned.device_address, self.address, count))

    def _copy(self, to: int, source: int, start: int, nbytes: int | None) -> None:
        count = self._nbytes - start if nbytes is None else nbytes
        self._gpu.runtime.copy(to + start, source + start, count, self._gpu.stream)


class Carrier:
    """Carries the same few arrays between device and pinned memory, pass after pass.

    A token's go by kernels, past copies of experts that are under way; a prompt's are copied.
    """

    def __init__(self, gpu: GPU) -> None:
        self._gpu = gpu
        self._launches: dict[tuple[int, int], Launch] = {}  # of a token, by where to and where from

    def carry(self, to: int, source: int, row_bytes: int, tokens: int) -> None:
        """Queue the way of T rows; addresses as the device sees them."""
        gpu = self._gpu
        if tokens > 1:
            gpu.runtime.copy(to, source, tokens * row_bytes, gpu.stream)
            return
        if (to, source) not in self._launches:
            self._launches[to, source] = bring(gpu, to, source, row_bytes)
        gpu.launch(self._launches[to, source])


class Signal:
    """A point in the device's work; the host waits for it with a bound."""

    def __init__(self, gpu: GPU, wait_s: float) -> None:
        self._gpu = gpu
        self._event = gpu.runtime.event()
        self._wait_s = wait_s
        self._marked = False

    def mark(self) -> None:
        """Set the point behind everything that has been queued."""
        self._gpu.runtime.record(self._event, self._gpu.stream)
        self._marked = True

    @property
    def passed(self) -> bool:
        """Whether the device has come to the point set last; true where none was."""
        return not self._marked or self._gpu.runtime.done(self._event)

    def wait(self, what: str) -> None:
        """Return when the device has come to the point.

        Raises:
            DeviceError: it has not within the bound.
        """
        runtime, event = self._gpu.runtime, self._event
        if self._marked and not runtime.done(event):
            poll(lambda: runtime.done(event), self._wait_s, f"{what} on {runtime.name}")
