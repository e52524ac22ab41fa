"""Names of compute devices: what a name says, and which may stand beside each other."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fomoe.errors import ConfigError

GPU_KINDS = ("hip", "cuda")

# A device may stand on another node of the cluster: cpu@192.168.1.20.
_PATTERN = re.compile(r"(cpu(:\d+)?|(hip|cuda):\d+)(@[\w.:-]+)?")


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the device names of a comma-separated list such as `cpu,cpu` or `hip:0,hip:1`."""
    return tuple(name.strip() for name in text.split(","))


def is_gpu(name: str) -> bool:
    """Whether a device is a GPU, which hosts whole layers."""
    return name.partition(":")[0] in GPU_KINDS


def local_name(name: str) -> str:
    """Return a device's name on its own node: `hip:1` of `hip:1@desk`."""
    return name.partition("@")[0]


def check_devices(names: Iterable[str]) -> None:
    """Refuse names that are not devices, or that do not go together.

    A GPU may be named more than once: each name is an actor of its own, and they take turns.

    Raises:
        ConfigError: names the device and says what to write.
    """
    given = tuple(names)
    if not given:
        raise ConfigError("no device is named; cpu is always there")
    for name in given:
        if _PATTERN.fullmatch(name) is None:
            raise ConfigError(
                f"{name!r} is not a device; write cpu, cpu:N, hip:N or cuda:N, "
                "several with commas: cpu,cpu"
            )
    twice = sorted({name for name in given if given.count(name) > 1})
    numbered = [name for name in twice if local_name(name) != "cpu" and not is_gpu(name)]
    if numbered:
        raise ConfigError(
            f"device {', '.join(numbered)} is named twice; plain cpu and GPUs may be repeated"
        )
    kinds = {name.partition(":")[0] if is_gpu(name) else "cpu" for name in given}
    if len(kinds) > 1:
        raise ConfigError(
            f"devices {', '.join(given)} are of {len(kinds)} kinds; this version takes one kind "
            "at a time: all cpu, all hip or all cuda"
        )
