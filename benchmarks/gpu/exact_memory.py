"""Memory of a device: what thousands of tokens and a killed process leave behind."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from exact_texts import MODEL
from support.emulated_gpu import install_standin

from fomoe.engine.gpu_local import GPUText, resident_model
from fomoe.kernels.gpu.gpu import open_runtime

_WARM = 64
_CHILD_S = 120.0  # to the first token, all kernels compiled
_FREED_S = 20.0
_PAUSE_S = 0.05
_CHILD = """
import sys
sys.path[:0] = {path!r}
from exact_memory import decode_on
decode_on({device!r}, emulated={emulated!r}, seconds={seconds!r})
"""


def growth(device: str, tokens: int) -> dict[str, Any]:
    """Return the bytes of device memory that a text of many tokens takes beyond its beginning."""
    with resident_model(MODEL, device, ctx_size=tokens + 2 * _WARM, max_tokens=_WARM) as model:
        text = GPUText(model)
        for _ in text.generate(list(range(1, _WARM + 1)), _WARM):
            pass
        free, token = model.runtime.memory()[0], 1
        for _ in range(tokens - _WARM):
            token = text.step(token)
        return {"tokens": tokens, "bytes grown": free - model.runtime.memory()[0]}


def killed(device: str, rounds: int, *, emulated: bool) -> list[dict[str, Any]]:
    """Kill a decoding process some times; returns bytes that it held and bytes that stay taken.

    The kill falls anywhere into a token: the process does nothing else. An emulated device's
    memory is the process's own, of which nobody else sees anything.
    """
    runtime = open_runtime(device)
    try:
        found = []
        for number in range(rounds):
            before = runtime.memory()[0]
            with _decoding(device, emulated=emulated) as child:
                _await_first_token(child)
                time.sleep(_PAUSE_S * (1 + number))
                running = child.poll() is None
                held = before - runtime.memory()[0]
                child.kill()
                child.wait(_FREED_S)
            start = time.monotonic()
            while runtime.memory()[0] < before and time.monotonic() - start < _FREED_S:
                time.sleep(_PAUSE_S)
            found.append({
                "killed while decoding": running and child.returncode == -9,
                "bytes held": held,
                "bytes left": max(0, before - runtime.memory()[0]),
                "seconds until free": round(time.monotonic() - start, 2),
            })  # fmt: skip
        return found
    finally:
        runtime.close()


def decode_on(device: str, *, emulated: bool, seconds: float) -> None:
    """Say so at the first token, and decode for some time: what the killed process does."""
    if emulated:
        install_standin()
    with resident_model(MODEL, device, ctx_size=512, max_tokens=1) as model:
        model.decode(1, 0)
        model.decoded()
        sys.stdout.write("decoding\n")
        sys.stdout.flush()
        start, position = time.monotonic(), 0
        while time.monotonic() - start < seconds:
            position = position % 500 + 1
            model.decode(1, position)
            model.decoded()


def _decoding(device: str, *, emulated: bool) -> subprocess.Popen[str]:
    code = _CHILD.format(
        path=[str(Path(__file__).parent), *sys.path], device=device, emulated=emulated,
        seconds=_CHILD_S,
    )  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def _await_first_token(child: subprocess.Popen[str]) -> None:
    """Raise TimeoutError where the process says nothing, RuntimeError where it ends."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], _CHILD_S)[0]:
        child.kill()
        raise TimeoutError(f"no token after {_CHILD_S:.0f} s")
    if child.stdout.readline() != "decoding\n":
        child.kill()
        raise RuntimeError("the decoding process ended; what it wrote stands above")
