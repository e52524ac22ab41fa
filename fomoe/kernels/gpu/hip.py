"""AMD devices, by hip-python; imported when a device `hip:N` is asked for."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from hip import hip

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.runtime import U8, WAIT_S, Graph, Pinned, poll

_OK = hip.hipError_t.hipSuccess
_NOT_READY = hip.hipError_t.hipErrorNotReady
_ANY_WAY = hip.hipMemcpyKind.hipMemcpyDefault
_NO_TIMING = 2  # hipEventDisableTiming
_NON_BLOCKING = 1  # hipStreamNonBlocking
_MAPPED = 3  # hipHostMallocPortable | hipHostMallocMapped, the same for hipHostRegister
_THIS_THREAD = hip.hipStreamCaptureMode.hipStreamCaptureModeThreadLocal
# RDNA 3 and 4, MI300: those whose matrix instructions the prelude has. "cpu" is for tests.
_TARGETS = ("gfx11", "gfx12", "gfx942", "cpu")


class HipRuntime:
    """Device `hip:index`; see `Runtime` for what the methods do."""

    def __init__(self, index: int) -> None:
        self.name = f"hip:{index}"
        self._index = index
        count = self._count()
        if index >= count:
            raise DeviceError(
                f"{self.name}: HIP sees {count} devices; see `rocminfo`, and whether this user is "
                "in the groups of /dev/kfd and /dev/dri/renderD* (render, video)"
            )
        self.attach()
        properties = self._call(hip.hipGetDeviceProperties, index)
        self.target = properties.gcnArchName.partition(":")[0]
        if not self.target.startswith(_TARGETS):
            raise DeviceError(
                f"{self.name} is a {self.target}: kernels are for RDNA 3 and 4 (gfx11, gfx12) and "
                "MI300 (gfx942); name another device, `rocminfo` lists them"
            )
        self.wave = int(properties.warpSize)
        self.cores = int(properties.multiProcessorCount)
        self.shared_bytes = int(properties.sharedMemPerBlock)
        self._streams: list[int] = []
        self._events: list[int] = []
        self._graphs: list[int] = []
        self._modules: list[Any] = []
        self._pinned: list[int] = []

    def _count(self) -> int:
        try:
            error, count = hip.hipGetDeviceCount()
        except RuntimeError as problem:
            raise DeviceError(
                f"{self.name}: AMD's HIP runtime cannot be loaded ({problem}); install ROCm 6.4 or "
                "newer (libamdhip64), and set ROCM_PATH where it is not in /opt/rocm"
            ) from None
        if error == hip.hipError_t.hipErrorNoDevice:
            return 0
        if error != _OK:
            self._fail("hipGetDeviceCount", error)
        return int(count)

    def _call(self, function: Any, *args: Any) -> Any:
        error, *values = function(*args)
        if error != _OK:
            self._fail(function.__name__, error)
        return values[0] if values else None

    def _fail(self, what: str, error: Any) -> None:
        raise DeviceError(f"{self.name}: {what}: {_text(error)} ({int(error)})")

    def attach(self) -> None:
        self._call(hip.hipSetDevice, self._index)

    def memory(self) -> tuple[int, int]:
        error, free, total = hip.hipMemGetInfo()
        if error != _OK:
            self._fail("hipMemGetInfo", error)
        return int(free), int(total)

    def alloc(self, nbytes: int) -> int:
        error, address = hip.hipMalloc(nbytes)
        if error != _OK:
            free, total = self.memory()
            raise DeviceError(
                f"{self.name}: no {nbytes:,} bytes in one piece; {free:,} of {total:,} are free: "
                f"{_text(error)}"
            )
        return int(address)

    def free(self, address: int) -> None:
        self._call(hip.hipFree, address)

    def pinned(self, nbytes: int) -> Pinned:
        address = int(self._call(hip.hipHostMalloc, nbytes, _MAPPED))
        self._pinned.append(address)
        device = int(self._call(hip.hipHostGetDevicePointer, address, 0))
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        return Pinned(address, device, np.ctypeslib.as_array(memory))

    def unpin(self, pinned: Pinned) -> None:
        self._pinned.remove(pinned.address)
        self._call(hip.hipHostFree, pinned.address)

    def register(self, array: U8) -> int:
        address = array.ctypes.data
        (error,) = hip.hipHostRegister(address, array.nbytes, _MAPPED)
        if error != _OK:
            raise DeviceError(
                f"{self.name}: {array.nbytes:,} bytes of RAM cannot be pinned: {_text(error)}; "
                "amdgpu counts them once for every process with a GPU: lower --ram-budget to the "
                "machine's memory over the number of devices, or load amdgpu with "
                "no_system_mem_limit=1"
            )
        return int(self._call(hip.hipHostGetDevicePointer, address, 0))

    def unregister(self, array: U8) -> None:
        self._call(hip.hipHostUnregister, array.ctypes.data)

    def stream(self) -> int:
        self._streams.append(int(self._call(hip.hipStreamCreateWithFlags, _NON_BLOCKING)))
        return self._streams[-1]

    def event(self, timing: bool = False) -> int:
        flags = 0 if timing else _NO_TIMING
        self._events.append(int(self._call(hip.hipEventCreateWithFlags, flags)))
        return self._events[-1]

    def record(self, event: int, stream: int) -> None:
        self._call(hip.hipEventRecord, event, stream)

    def wait(self, event: int, stream: int) -> None:
        self._call(hip.hipStreamWaitEvent, stream, event, 0)

    def done(self, event: int) -> bool:
        return self._ready(hip.hipEventQuery, event)

    def _ready(self, query: Any, handle: int) -> bool:
        (error,) = query(handle)
        if error == _OK:
            return True
        if error != _NOT_READY:
            self._fail(query.__name__, error)
        return False

    def synchronize(self, stream: int, within_s: float = WAIT_S) -> None:
        poll(lambda: self._ready(hip.hipStreamQuery, stream), within_s, f"{self.name}: a stream")

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call(hip.hipEventElapsedTime, start, end))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._call(hip.hipMemcpyAsync, to, source, nbytes, _ANY_WAY, stream)

    def fill(self, to: int, byte: int, nbytes: int, stream: int) -> None:
        self._call(hip.hipMemsetAsync, to, byte, nbytes, stream)

    def load(self, image: bytes) -> Any:
        self._modules.append(self._call(hip.hipModuleLoadData, image))
        return self._modules[-1]

    def function(self, module: Any, name: str) -> int:
        return int(self._call(hip.hipModuleGetFunction, module, name.encode()))

    def launch(self, launch: Launch, stream: int) -> None:
        (error,) = hip.hipModuleLaunchKernel(
            launch.function, *launch.grid, *launch.group, launch.shared, stream,
            launch.parameters, None,
        )  # fmt: skip
        if error != _OK:
            self._fail("hipModuleLaunchKernel", error)

    def begin_capture(self, stream: int) -> None:
        self._call(hip.hipStreamBeginCapture, stream, _THIS_THREAD)

    def end_capture(self, stream: int) -> Graph:
        captured = self._call(hip.hipStreamEndCapture, stream)
        self._graphs.append(int(self._call(hip.hipGraphInstantiateWithFlags, captured, 0)))
        self._call(hip.hipGraphDestroy, captured)
        return Graph(self._graphs[-1])

    def run(self, graph: Graph, stream: int) -> None:
        (error,) = hip.hipGraphLaunch(graph.handle, stream)
        if error != _OK:
            self._fail("hipGraphLaunch", error)

    def drop(self, graph: Graph) -> None:
        self._graphs.remove(graph.handle)
        self._call(hip.hipGraphExecDestroy, graph.handle)

    def close(self) -> None:
        for stream in self._streams:
            self.synchronize(stream)
        for destroy, handles in (
            (hip.hipGraphExecDestroy, self._graphs),
            (hip.hipEventDestroy, self._events),
            (hip.hipStreamDestroy, self._streams),
            (hip.hipModuleUnload, self._modules),
            (hip.hipHostFree, self._pinned),
        ):
            for handle in handles:
                self._call(destroy, handle)
            handles.clear()


def _text(error: Any) -> str:
    text = hip.hipGetErrorString(error)[-1]
    return text.decode() if isinstance(text, bytes) else str(text)
