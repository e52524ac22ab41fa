"""A GPU as the builders of kernels see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.arena import Arena
from fomoe.kernels.gpu.compiler import Compiler
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.rtc import INSTALL
from fomoe.kernels.gpu.runtime import Runtime

Defines = Mapping[str, int]
_Key = tuple[str, tuple[tuple[str, int], ...]]


class GPU:
    """One device with its memory, a stream to compute on, and kernels by name."""

    def __init__(self, runtime: Runtime, compiler: Compiler, arena: Arena) -> None:
        self.runtime = runtime
        self.arena = arena
        self.stream = runtime.stream()
        self._compiler = compiler
        self._modules: dict[_Key, Any] = {}
        self._functions: dict[tuple[_Key, str], int] = {}
        self._closed = False

    def prepare(self, jobs: Sequence[tuple[str, Defines]]) -> None:
        """Compile and load units (name, defines) side by side, so that `kernel` finds them."""
        missing = {_key(*job): job for job in jobs if _key(*job) not in self._modules}
        waved = [(unit, self._with_wave(defines)) for unit, defines in missing.values()]
        for key, image in zip(missing, self._compiler.images(waved), strict=True):
            self._modules[key] = self.runtime.load(image)

    def kernel(self, unit: str, name: str, defines: Defines) -> int:
        """Return kernel `name` of `unit`.hip, compiled with these defines and FM_WAVE.

        Raises:
            DeviceError: it does not compile, with the compiler's log.
        """
        key = _key(unit, defines)
        if (key, name) not in self._functions:
            self.prepare([(unit, defines)])
            self._functions[key, name] = self.runtime.function(self._modules[key], name)
        return self._functions[key, name]

    def _with_wave(self, defines: Defines) -> dict[str, int]:
        return {**defines, "FM_WAVE": self.runtime.wave}

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array's bytes to the device, and wait for it."""
        array = np.ascontiguousarray(array)
        self.runtime.copy(address, array.ctypes.data, array.nbytes, self.stream)
        self.runtime.synchronize(self.stream)

    def download(
        self, address: int, dtype: npt.DTypeLike, shape: int | tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """Return what lies at a device address, after the stream's work so far."""
        out = np.empty(shape, dtype)
        self.runtime.copy(out.ctypes.data, address, out.nbytes, self.stream)
        self.runtime.synchronize(self.stream)
        return out

    def launch(self, launch: Launch) -> None:
        """Put a kernel into this GPU's stream."""
        self.runtime.launch(launch, self.stream)

    def close(self) -> None:
        """Wait for the work and give everything back; nothing where that has been done."""
        if self._closed:
            return
        self._closed = True
        self.runtime.synchronize(self.stream)
        self.arena.close()
        self.runtime.close()


def _key(unit: str, defines: Defines) -> _Key:
    return unit, tuple(sorted(defines.items()))


def _open_hip(index: int) -> Runtime:
    from fomoe.kernels.gpu.hip import HipRuntime

    return HipRuntime(index)


def _open_cuda(index: int) -> Runtime:
    from fomoe.kernels.gpu.cuda import CudaRuntime

    return CudaRuntime(index)


_OPEN: dict[str, Callable[[int], Runtime]] = {"hip": _open_hip, "cuda": _open_cuda}


def open_runtime(name: str) -> Runtime:
    """Return the driver's side of a device "hip:N" or "cuda:N"."""
    kind, _, index = name.partition(":")
    if kind not in _OPEN or not index.isdigit():
        raise DeviceError(f"device {name!r}: a GPU is hip:N or cuda:N with N from 0")
    try:
        return _OPEN[kind](int(index))
    except ImportError as problem:
        raise DeviceError(f"{name}: {problem}; install it: {INSTALL[kind]}") from None


def open_gpu(name: str, arena_bytes: int, units: Path | None = None) -> GPU:
    """Return a GPU with an arena of that many bytes; `units` is a folder of other kernels.

    Raises:
        DeviceError: the driver, its compiler, the device or the memory is missing.
    """
    runtime = open_runtime(name)
    try:
        compiler = Compiler.open(name.partition(":")[0], runtime.target, units)
        return GPU(runtime, compiler, Arena(runtime, arena_bytes))
    except DeviceError:
        runtime.close()
        raise
