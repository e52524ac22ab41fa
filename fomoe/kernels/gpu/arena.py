"""One allocation of a device, handed out piece by piece."""

from __future__ import annotations

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.runtime import Runtime

ALIGN = 256  # bytes: where pieces begin, as copies and 16-byte loads of whole waves want it


def aligned(nbytes: int, align: int = ALIGN) -> int:
    """Return the next multiple of `align`."""
    return -(-nbytes // align) * align


class Arena:
    """`nbytes` of device memory in one piece, so that what fits is known at start."""

    def __init__(self, runtime: Runtime, nbytes: int) -> None:
        self.nbytes = nbytes
        self.base = runtime.alloc(nbytes) if nbytes else 0
        self._runtime = runtime
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes that are taken, with what alignment cost."""
        return self._used

    def take(self, nbytes: int, align: int = ALIGN) -> int:
        """Return the address of `nbytes` that nobody else has, aligned to a power of two.

        Raises:
            DeviceError: what is left is too small.
        """
        start = aligned(self.base + self._used, align) - self.base
        if start + nbytes > self.nbytes:
            raise DeviceError(
                f"{self._runtime.name}: {nbytes:,} bytes asked of {self.nbytes - self._used:,} "
                f"that are left of {self.nbytes:,}; give the device a larger --vram-budget"
            )
        self._used = start + nbytes
        return self.base + start

    def close(self) -> None:
        """Give the memory back."""
        if self.base:
            self._runtime.free(self.base)
            self.base = self.nbytes = self._used = 0
