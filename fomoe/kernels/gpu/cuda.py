"""NVIDIA devices, by cuda.bindings; imported when a device `cuda:N` is asked for."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda.bindings import driver as cu

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.runtime import U8, WAIT_S, Graph, Pinned, poll

_OK = cu.CUresult.CUDA_SUCCESS
_NOT_READY = cu.CUresult.CUDA_ERROR_NOT_READY
_NO_TIMING = int(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING)
_NON_BLOCKING = int(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
_MAPPED = 3  # CU_MEMHOSTALLOC_PORTABLE | _DEVICEMAP, the same for CU_MEMHOSTREGISTER
_THIS_THREAD = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_STATIC_SHARED = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_DYNAMIC_SHARED = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_PERCENT = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
# Of a core's memory, for kernels that start early: a core that is split another way for the next
# kernel has to be empty first. 196 of 228 KiB on Hopper; the rest is its cache.
_EARLY_SHARED_PERCENT = 85
_OLDEST = (7, 5)
_OLDEST_DRIVER = 13000  # what loads code of NVRTC 13; release 580
_EARLY = (9, 0)  # knows programmatic dependent launches


class CudaRuntime:
    """Device `cuda:index`; see `Runtime` for what the methods do."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        count = self._count()
        if index >= count:
            raise DeviceError(f"{self.name}: CUDA sees {count} devices; see `nvidia-smi`")
        self._device = self._call(cu.cuDeviceGet, index)
        major, minor = (
            self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR")
        )
        if (major, minor) < _OLDEST:
            raise DeviceError(
                f"{self.name}: compute capability {major}.{minor}, at least 7.5 (Turing) is needed"
            )
        self.target = f"sm_{major}{minor}"
        self._starts_early = (major, minor) >= _EARLY
        self.wave = self._attribute("WARP_SIZE")
        self.cores = self._attribute("MULTIPROCESSOR_COUNT")
        self.shared_bytes = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self._context = self._call(cu.cuDevicePrimaryCtxRetain, self._device)
        self._streams: list[int] = []
        self._events: list[int] = []
        self._graphs: list[int] = []
        self._modules: list[Any] = []
        self._pinned: list[int] = []
        self._alike: set[int] = set()
        self.attach()

    def _count(self) -> int:
        try:
            (error,) = cu.cuInit(0)
        except RuntimeError as problem:
            raise DeviceError(
                f"{self.name}: NVIDIA's driver library libcuda.so.1 cannot be loaded ({problem}); "
                "install NVIDIA's driver, release 580 or newer"
            ) from None
        if error == cu.CUresult.CUDA_ERROR_NO_DEVICE:
            return 0
        if error != _OK:
            self._fail("cuInit", error)
        version = int(self._call(cu.cuDriverGetVersion))
        if version < _OLDEST_DRIVER:
            raise DeviceError(
                f"{self.name}: the driver supports CUDA {version // 1000}.{version % 1000 // 10}; "
                "install NVIDIA's driver, release 580 or newer, for CUDA 13"
            )
        return int(self._call(cu.cuDeviceGetCount))

    def _attribute(self, name: str) -> int:
        key = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call(cu.cuDeviceGetAttribute, key, self._device))

    def _call(self, function: Any, *args: Any) -> Any:
        error, *values = function(*args)
        if error != _OK:
            self._fail(function.__name__, error)
        return values[0] if values else None

    def _fail(self, what: str, error: Any) -> None:
        raise DeviceError(f"{self.name}: {what}: {_text(error)} ({int(error)})")

    def attach(self) -> None:
        self._call(cu.cuCtxSetCurrent, self._context)

    def memory(self) -> tuple[int, int]:
        error, free, total = cu.cuMemGetInfo()
        if error != _OK:
            self._fail("cuMemGetInfo", error)
        return int(free), int(total)

    def alloc(self, nbytes: int) -> int:
        error, address = cu.cuMemAlloc(nbytes)
        if error != _OK:
            free, total = self.memory()
            raise DeviceError(
                f"{self.name}: no {nbytes:,} bytes in one piece; {free:,} of {total:,} are free: "
                f"{_text(error)}"
            )
        return int(address)

    def free(self, address: int) -> None:
        self._call(cu.cuMemFree, address)

    def pinned(self, nbytes: int) -> Pinned:
        address = int(self._call(cu.cuMemHostAlloc, nbytes, _MAPPED))
        self._pinned.append(address)
        device = int(self._call(cu.cuMemHostGetDevicePointer, address, 0))
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        return Pinned(address, device, np.ctypeslib.as_array(memory))

    def unpin(self, pinned: Pinned) -> None:
        self._pinned.remove(pinned.address)
        self._call(cu.cuMemFreeHost, pinned.address)

    def register(self, array: U8) -> int:
        address = array.ctypes.data
        self._call(cu.cuMemHostRegister, address, array.nbytes, _MAPPED)
        return int(self._call(cu.cuMemHostGetDevicePointer, address, 0))

    def unregister(self, array: U8) -> None:
        self._call(cu.cuMemHostUnregister, array.ctypes.data)

    def stream(self) -> int:
        self._streams.append(int(self._call(cu.cuStreamCreate, _NON_BLOCKING)))
        return self._streams[-1]

    def event(self, timing: bool = False) -> int:
        flags = 0 if timing else _NO_TIMING
        self._events.append(int(self._call(cu.cuEventCreate, flags)))
        return self._events[-1]

    def record(self, event: int, stream: int) -> None:
        self._call(cu.cuEventRecord, event, stream)

    def wait(self, event: int, stream: int) -> None:
        self._call(cu.cuStreamWaitEvent, stream, event, 0)

    def done(self, event: int) -> bool:
        return self._ready(cu.cuEventQuery, event)

    def _ready(self, query: Any, handle: int) -> bool:
        (error,) = query(handle)
        if error == _OK:
            return True
        if error != _NOT_READY:
            self._fail(query.__name__, error)
        return False

    def synchronize(self, stream: int, within_s: float = WAIT_S) -> None:
        poll(lambda: self._ready(cu.cuStreamQuery, stream), within_s, f"{self.name}: a stream")

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call(cu.cuEventElapsedTime, start, end))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._call(cu.cuMemcpyAsync, to, source, nbytes, stream)

    def fill(self, to: int, byte: int, nbytes: int, stream: int) -> None:
        self._call(cu.cuMemsetD8Async, to, byte, nbytes, stream)

    def load(self, image: bytes) -> Any:
        self._modules.append(self._call(cu.cuModuleLoadData, image))
        return self._modules[-1]

    def function(self, module: Any, name: str) -> int:
        function = self._call(cu.cuModuleGetFunction, module, name.encode())
        # Without this a launch may ask for 48 KiB of shared memory and no more.
        rest = self.shared_bytes - int(self._call(cu.cuFuncGetAttribute, _STATIC_SHARED, function))
        self._call(cu.cuFuncSetAttribute, function, _DYNAMIC_SHARED, rest)
        return int(function)

    def launch(self, launch: Launch, stream: int) -> None:
        if launch.early and self._starts_early:
            self._split_alike(launch.function)
            self._call(
                cu.cuLaunchKernelEx, _early(launch, stream), launch.function, launch.parameters, 0
            )
            return
        (error,) = cu.cuLaunchKernel(
            launch.function, *launch.grid, *launch.group, launch.shared, stream,
            launch.parameters, 0,
        )  # fmt: skip
        if error != _OK:
            self._fail("cuLaunchKernel", error)

    def _split_alike(self, function: int) -> None:
        if function not in self._alike:
            self._call(cu.cuFuncSetAttribute, function, _SHARED_PERCENT, _EARLY_SHARED_PERCENT)
            self._alike.add(function)

    def begin_capture(self, stream: int) -> None:
        self._call(cu.cuStreamBeginCapture, stream, _THIS_THREAD)

    def end_capture(self, stream: int) -> Graph:
        captured = self._call(cu.cuStreamEndCapture, stream)
        self._graphs.append(int(self._call(cu.cuGraphInstantiate, captured, 0)))
        self._call(cu.cuGraphDestroy, captured)
        return Graph(self._graphs[-1])

    def run(self, graph: Graph, stream: int) -> None:
        (error,) = cu.cuGraphLaunch(graph.handle, stream)
        if error != _OK:
            self._fail("cuGraphLaunch", error)

    def drop(self, graph: Graph) -> None:
        self._graphs.remove(graph.handle)
        self._call(cu.cuGraphExecDestroy, graph.handle)

    def close(self) -> None:
        for stream in self._streams:
            self.synchronize(stream)
        for destroy, handles in (
            (cu.cuGraphExecDestroy, self._graphs),
            (cu.cuEventDestroy, self._events),
            (cu.cuStreamDestroy, self._streams),
            (cu.cuModuleUnload, self._modules),
            (cu.cuMemFreeHost, self._pinned),
        ):
            for handle in handles:
                self._call(destroy, handle)
            handles.clear()
        self._call(cu.cuDevicePrimaryCtxRelease, self._device)


def _early(launch: Launch, stream: int) -> Any:
    """How to launch a kernel that may start before the one before it has ended."""
    attribute, config = cu.CUlaunchAttribute(), cu.CUlaunchConfig()
    attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.group
    config.sharedMemBytes, config.hStream = launch.shared, stream
    config.attrs, config.numAttrs = [attribute], 1
    return config


def _text(error: Any) -> str:
    _, text = cu.cuGetErrorString(error)
    return text.decode() if text else str(error)
