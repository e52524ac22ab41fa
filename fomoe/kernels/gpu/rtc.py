"""Run-time compilation by hiprtc or NVRTC, as a program: a builtin that a target lacks ends it.

`python -m fomoe.kernels.gpu.rtc hip|cuda TARGET OUTPUT` reads a source from its input. Exit status
1 is a source that does not compile, with the compiler's log as output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fomoe.errors import DeviceError

# What to type where a device's packages are missing or too old.
INSTALL = {
    "hip": f"{sys.executable} -m pip install -U 'hip-python>=10'",
    "cuda": f"{sys.executable} -m pip install -U 'cuda-bindings>=13' 'nvidia-cuda-nvrtc>=13'",
}
# What each compiler is given beside the target.
OPTIONS = {"hip": ("-O3", "-std=c++17", "-fno-strict-aliasing"), "cuda": ("-std=c++17",)}


def hip_version() -> str:
    """Return hiprtc's version; DeviceError where it is not installed."""
    from hip import hip, hiprtc

    try:
        own = _values(hiprtc.hiprtcVersion())  # the same over many releases of ROCm
        return "hiprtc {}.{} of HIP {}".format(*own, *_values(hip.hipRuntimeGetVersion()))
    except RuntimeError as problem:
        raise DeviceError(
            f"AMD's run-time compiler cannot be loaded ({problem}); install ROCm's hiprtc "
            "(libhiprtc), and set ROCM_PATH where it is not in /opt/rocm"
        ) from None


def hip_compile(source: str, target: str) -> bytes:
    """Return the code object of a source for e.g. "gfx1200"."""
    from hip import hiprtc

    program = _values(hiprtc.hiprtcCreateProgram(source.encode(), b"kernel.hip", 0, None, None))[0]
    options = [each.encode() for each in (f"--offload-arch={target}", *OPTIONS["hip"])]
    (result,) = hiprtc.hiprtcCompileProgram(program, len(options), options)
    if int(result) != 0:
        log = bytearray(_values(hiprtc.hiprtcGetProgramLogSize(program))[0])
        hiprtc.hiprtcGetProgramLog(program, log)
        raise DeviceError(log.rstrip(b"\0").decode(errors="replace"))
    code = bytearray(_values(hiprtc.hiprtcGetCodeSize(program))[0])
    _values(hiprtc.hiprtcGetCode(program, code))
    return bytes(code)


def cuda_version() -> str:
    """Return NVRTC's version; DeviceError where it is not installed."""
    try:
        from cuda.bindings import nvrtc

        return "nvrtc {}.{}".format(*_values(nvrtc.nvrtcVersion()))
    except (ImportError, RuntimeError) as problem:
        raise DeviceError(
            f"NVIDIA's run-time compiler cannot be loaded ({problem}); "
            f"install it: {INSTALL['cuda']}"
        ) from None


def cuda_compile(source: str, target: str) -> bytes:
    """Return the cubin of a source for e.g. "sm_90"."""
    from cuda.bindings import nvrtc

    known = _values(nvrtc.nvrtcGetSupportedArchs())[-1]
    if int(target.removeprefix("sm_")) not in known:
        raise DeviceError(f"{cuda_version()} does not know {target}; {INSTALL['cuda']}")
    options = [each.encode() for each in (f"--gpu-architecture={target}", *OPTIONS["cuda"])]
    program = _values(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.hip", 0, [], []))[0]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result) != 0:
        log = b" " * _values(nvrtc.nvrtcGetProgramLogSize(program))[0]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise DeviceError(log.rstrip(b"\0 ").decode(errors="replace"))
    code: bytes = b" " * _values(nvrtc.nvrtcGetCUBINSize(program))[0]
    _values(nvrtc.nvrtcGetCUBIN(program, code))
    return code


COMPILERS: dict[str, tuple[Callable[[], str], Callable[[str, str], bytes]]] = {
    "hip": (hip_version, hip_compile),
    "cuda": (cuda_version, cuda_compile),
}


def _values(result: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = result
    if int(error) != 0:
        raise DeviceError(f"run-time compiler: {error}")
    return tuple(values)


def main(kind: str, target: str, output: str) -> int:
    """Compile standard input to `output`; 1 and the log where that fails."""
    try:
        code = COMPILERS[kind][1](sys.stdin.read(), target)
    except DeviceError as problem:
        sys.stdout.write(str(problem))
        return 1
    Path(output).write_bytes(code)
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # without the driver's own way of ending, which takes its time
