"""GPUs for tests: the real runtimes over a stand-in for the vendors' libraries, on the CPU.

`hip:0` has waves of 32 lanes, `hip:1` of 64. A seed chooses the order of lanes, waves, groups and
streams. hip-python loads its libraries once per process, so they are put in place here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe.config import cache_dir
from fomoe.kernels.gpu.arena import Arena
from fomoe.kernels.gpu.compiler import Compiler
from fomoe.kernels.gpu.gpu import GPU, open_gpu, open_runtime

_SOURCES = Path(__file__).parent / "standin"
_HEADERS = Path(__file__).parents[2] / "fomoe" / "kernels" / "hip"
_DEVICES = {32: "hip:0", 64: "hip:1"}
_BUILD_S = 120


@functools.cache
def install_standin() -> Path:
    """Build the stand-in libraries where they are missing, and make hip-python load them.

    Not where TEST_GPU names a device of HIP: its library would never be loaded.
    """
    if os.environ.get("TEST_GPU", "").startswith("hip"):
        pytest.skip("a stand-in beside the real library of TEST_GPU")
    files = sorted(f for f in _SOURCES.rglob("*") if f.is_file())
    texts = [f.read_bytes() for f in [*files, _HEADERS / "cpu_engine.h", Path(__file__)]]
    version = hashlib.sha256(b"".join(texts)).hexdigest()[:8]
    root = cache_dir() / f"standin-{version}"
    if not root.is_dir():
        _build(root, int(version, 16) & 0x7FFFFFFF)
    os.environ["ROCM_PATH"] = str(root)
    return root


def _build(root: Path, version: int) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        lib = Path(folder) / "made" / "lib"
        lib.mkdir(parents=True)
        hip, cuda = lib / "libamdhip64.so", lib / "libcuda.so.1"
        _library(hip, _SOURCES, f"-I{_HEADERS}", f"-DSTANDIN_VERSION={version}", "-pthread")
        (lib / "libhiprtc.so").symlink_to(hip.name)
        soname = f"-Wl,-soname,{cuda.name},-rpath,$ORIGIN"
        _library(cuda, _SOURCES / "cuda", f"-L{lib}", "-Wl,--no-as-needed", "-lamdhip64", soname)
        with contextlib.suppress(OSError):  # another process was first
            lib.parent.rename(root)


def _library(path: Path, sources: Path, *options: str) -> None:
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += [*map(str, sorted(sources.glob("*.cpp"))), *options, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def emulated_gpu(
    wave: int = 32, seed: int = 1, arena_bytes: int = 64 << 20, units: Path | None = None
) -> Iterator[GPU]:
    """Open a GPU of that wave size; `units` is a folder with further kernels."""
    root = install_standin()
    ctypes.CDLL(str(root / "lib" / "libamdhip64.so")).fm_standin_seed(ctypes.c_ulonglong(seed))
    gpu = open_gpu(_DEVICES[wave], arena_bytes, units)
    try:
        yield gpu
    finally:
        gpu.close()


@contextlib.contextmanager
def emulated_cuda(arena_bytes: int = 64 << 20, units: Path | None = None) -> Iterator[GPU]:
    """Open `cuda:0` of the stand-in: the real CudaRuntime, with kernels compiled as for hip:0.

    From then on cuda.bindings has this driver for as long as the process lives.
    """
    root = install_standin()
    ctypes.CDLL(str(root / "lib" / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    runtime = open_runtime("cuda:0")
    gpu = GPU(runtime, Compiler.open("hip", "cpu", units), Arena(runtime, arena_bytes))
    try:
        yield gpu
    finally:
        gpu.close()


@contextlib.contextmanager
def gpu_under_test(wave: int, seed: int | None = None, units: Path | None = None) -> Iterator[GPU]:
    """An emulated GPU with waves of so many lanes, or the one that TEST_GPU names.

    `seed` is of the emulation's order, `units` a folder of other kernels.
    """
    name = os.environ.get("TEST_GPU")
    if not name:
        with emulated_gpu(wave, seed=wave if seed is None else seed, units=units) as gpu:
            yield gpu
        return
    gpu = open_gpu(name, 64 << 20, units)
    try:
        if gpu.runtime.wave != wave:
            pytest.skip(f"{name} has waves of {gpu.runtime.wave} lanes")
        yield gpu
    finally:
        gpu.close()
