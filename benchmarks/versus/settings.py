"""llama.cpp's settings, and the search for the best of them, one knob at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from versus.engine import EngineError

LLAMA = "llama-cpp-python==0.3.36"
CMAKE_ARGS = "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release"


_WORTH = 0.98  # a knob is turned for two percent and up; less is noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What may be set; `read_ahead_kib` is the kernel's, None leaves it as it is.

    `load` is mmap, read (into memory) or direct (the same past the page cache); `lazy` reads rows
    of tensors that the architecture marks when they are wanted. `passive` lets OpenMP's threads
    sleep at barriers where they spin otherwise.
    """

    repack: bool = True
    flash: bool = True
    ubatch: int = 512
    load: str = "mmap"
    lazy: bool = False
    passive: bool = False
    read_ahead_kib: int | None = None

    def runner(self) -> dict[str, Any]:
        """Return what the runner takes."""
        return {k: v for k, v in asdict(self).items() if k not in ("passive", "read_ahead_kib")}

    def environment(self) -> tuple[str, ...]:
        """Return what the runner's environment gets."""
        return ("OMP_WAIT_POLICY=passive",) if self.passive else ()

    def text(self) -> str:
        """Return the settings in one line."""
        ahead = "" if self.read_ahead_kib is None else f", read-ahead {self.read_ahead_kib} KiB"
        extra = (", lazy" if self.lazy else "") + (", passive waits" if self.passive else "")
        return (
            f"repack {'on' if self.repack else 'off'}, flash attention "
            f"{'on' if self.flash else 'off'}, ubatch {self.ubatch}, {self.load}{extra}{ahead}"
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One tried setting: milliseconds, or why it failed."""

    settings: Settings
    ms: float | None
    failure: str = ""

    def text(self) -> str:
        """Return one line for people."""
        return f"{self.settings.text()}: " + (self.failure or f"{self.ms:,.1f} ms")


Knob = tuple[str, tuple[Any, ...]]


def knobs(prompt: int, *, limited: bool) -> list[Knob]:
    """Return what to vary, the most telling first; `prompt` is 0 where decoding is timed."""
    found: list[Knob] = [("repack", (True, False))]
    if limited:
        found.append(("read_ahead_kib", (None, 1024, 8192)))
    found.append(("flash", (True, False)))
    if prompt > 512:
        found.append(("ubatch", tuple(n for n in (512, 1024, 2048) if n <= prompt)))
    found += [("load", ("mmap", "read", "direct")), ("passive", (False, True))]
    if limited:
        found.append(("lazy", (False, True)))
    return found


def search(
    start: Settings, varied: list[Knob], measure: Callable[[Settings], float]
) -> tuple[Settings, list[Trial]]:
    """Return the fastest settings and all trials; EngineError where nothing works at all."""
    trials: dict[Settings, Trial] = {}

    def tried(settings: Settings) -> float:
        if settings not in trials:
            try:
                trials[settings] = Trial(settings, round(measure(settings), 2))
            except EngineError as error:
                trials[settings] = Trial(settings, None, str(error))
            print(f"  {trials[settings].text()}", flush=True)
        ms = trials[settings].ms
        return float("inf") if ms is None else ms

    best = start
    for name, values in varied:
        for other in (replace(best, **{name: value}) for value in values):
            if tried(other) < tried(best) * _WORTH:
                best = other
    if trials[best].ms is None:
        raise EngineError(f"no setting of llama.cpp works: {trials[best].failure}")
    return best, list(trials.values())


def ensure_llama(venv: Path) -> None:
    """Build llama.cpp from its source package into an environment of its own, once."""
    if (venv / "bin" / "python").exists():
        return
    print(f"building {LLAMA} in {venv}: several minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-binary", "llama-cpp-python"]
    subprocess.run(["env", f"CMAKE_ARGS={CMAKE_ARGS}", *pip, LLAMA], check=True, timeout=3600)
