"""GPUs for tests: the real HipRuntime over a stand-in for AMD's libraries, on the CPU.

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

from fomoe.config import cache_dir
from fomoe.kernels.gpu.gpu import GPU, open_gpu

_SOURCES = Path(__file__).parent / "standin"
_HEADERS = Path(__file__).parents[2] / "fomoe" / "kernels" / "hip"
_DEVICES = {32: "hip:0", 64: "hip:1"}
_BUILD_S = 120


@functools.cache
def install_standin() -> Path:
    """Build the stand-in libraries where they are missing, and make hip-python load them."""
    files = [*sorted(_SOURCES.iterdir()), _HEADERS / "cpu_engine.h"]
    version = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]
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
        command = [
            "g++",
            "-O2",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-pthread",
        ]
        command += [f"-I{_HEADERS}", f"-DSTANDIN_VERSION={version}"]
        command += [*map(str, sorted(_SOURCES.glob("*.cpp"))), "-o", str(lib / "libamdhip64.so")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_S, check=False
        )
        assert done.returncode == 0, done.stderr
        (lib / "libhiprtc.so").symlink_to("libamdhip64.so")
        with contextlib.suppress(OSError):  # another process was first
            lib.parent.rename(root)


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
