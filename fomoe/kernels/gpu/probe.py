"""Asks GPUs for their free memory, in a child process: a driver that was opened stays open.

A context costs hundreds of megabytes of device memory for as long as its process lives, and the
process that starts the actors has no use for one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from fomoe.errors import DeviceError

_BOUND_S = 60.0


def free_memory(names: Sequence[str]) -> tuple[int, ...]:
    """Return the free bytes of devices such as `cuda:0`.

    Raises:
        DeviceError: a device or what drives it is missing; says which and what to install.
    """
    command = [sys.executable, "-m", "fomoe.kernels.gpu.probe", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BOUND_S)
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"{', '.join(names)}: no answer from the driver within {_BOUND_S:.0f} s"
        ) from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise DeviceError(
            f"{', '.join(names)}: the driver ended the process that asked for free memory "
            f"(code {done.returncode}): {done.stderr.strip()[-500:]}"
        ) from None
    if "error" in answer:
        raise DeviceError(answer["error"])
    return tuple(answer["free"])


def main() -> None:
    """Print the free bytes of the devices that the arguments name, or what went wrong, as JSON."""
    from fomoe.kernels.gpu.gpu import open_runtime

    try:
        free: dict[str, int] = {}
        for name in sys.argv[1:]:
            if name not in free:
                runtime = open_runtime(name)
                free[name] = runtime.memory()[0]
                runtime.close()
        answer: dict[str, object] = {"free": [free[name] for name in sys.argv[1:]]}
    except DeviceError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
