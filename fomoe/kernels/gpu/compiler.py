"""Compiled kernels: from the cache on disk, else from a compiler in a process of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fomoe.config import cache_dir
from fomoe.errors import DeviceError
from fomoe.kernels.gpu import rtc, sources

COMPILE_S = 120.0
_AT_ONCE = min(16, os.cpu_count() or 1)  # compilers that run side by side
_FORMAT = "2"  # of the key


@dataclass(frozen=True, slots=True)
class Compiler:
    """Compiles units for one target; `kind` is "hip" or "cuda"."""

    kind: str
    target: str
    version: str
    units: Path
    cache: Path

    @classmethod
    def open(cls, kind: str, target: str, units: Path | None = None) -> Compiler:
        """Return the compiler for a target; DeviceError where it is not installed."""
        version = rtc.COMPILERS[kind][0]()
        return cls(kind, target, version, units or sources.FOLDER, cache_dir() / "kernels")

    def image(self, unit: str, defines: Mapping[str, int]) -> bytes:
        """Return the code of a unit, compiled now or before.

        Raises:
            DeviceError: it does not compile; the message holds the compiler's log.
        """
        source = sources.source_of(unit, defines, self.target, self.units)
        parts = (_FORMAT, self.kind, self.version, self.target, *rtc.OPTIONS[self.kind], source)
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        path = self.cache / f"{unit}-{self.target}-{key[:32]}.bin"
        if path.is_file():
            return path.read_bytes()
        self.cache.mkdir(parents=True, exist_ok=True)
        given = " ".join(f"{name}={value}" for name, value in sorted(defines.items()))
        self._compile(source, path, f"{unit}.hip for {self.target} with {given}")
        return path.read_bytes()

    def images(self, jobs: Sequence[tuple[str, Mapping[str, int]]]) -> list[bytes]:
        """Return the code of several units, compiled side by side."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda job: self.image(*job), jobs))

    def _compile(self, source: str, path: Path, what: str) -> None:
        """Compile into a file beside `path` and move it there, so that no half of it is seen."""
        with tempfile.TemporaryDirectory(dir=self.cache) as folder:
            made = Path(folder) / "code"
            command = [sys.executable, "-m", rtc.__name__, self.kind, self.target, str(made)]
            try:
                done = subprocess.run(
                    command, input=source, capture_output=True, text=True, timeout=COMPILE_S
                )
            except subprocess.TimeoutExpired:
                raise DeviceError(f"{what}: no code after {COMPILE_S:.0f} s") from None
            if done.returncode != 0:
                raise DeviceError(
                    f"{what} does not compile (status {done.returncode}):\n"
                    f"{done.stdout}{done.stderr}"
                )
            made.replace(path)
