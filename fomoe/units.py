"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import math
import re

from fomoe.errors import ConfigError

# Decimal units as on a disk's label, binary ones as the kernel counts memory; a bare letter is
# binary because that is what docker, systemd and ulimit mean by it.
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {
        _letter: 1024**_power,
        f"{_letter}IB": 1024**_power,
        f"{_letter}B": 1000**_power,
    }
_BYTES_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a text such as `4GiB`, `512MB`, `1.5G` or `1048576`.

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB and the bare letters K, M, G, T are
    powers of 1024; no unit means bytes. Fractions round down to a whole byte.

    Raises:
        ConfigError: the text is not a number followed by one of these units.
    """
    match = _BYTES_PATTERN.fullmatch(text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"{text!r} is not a size: write a number and a unit, for example 4GiB, 512MB or 1.5G"
        )
    return int(float(match.group(1)) * unit) if "." in match.group(1) else int(match[1]) * unit


def format_bytes(n_bytes: int) -> str:
    """Return a size for people in binary units with three digits, for example `1.50 GiB`."""
    if abs(n_bytes) < 1024:
        return f"{n_bytes} B"
    power = min(int(math.log2(abs(n_bytes)) // 10), 4)
    value = n_bytes / 1024**power
    if abs(value) >= 999.5 and power < 4:
        value, power = value / 1024, power + 1
    digits = max(0, 2 - int(math.log10(max(abs(value), 1.0))))
    return f"{value:.{digits}f} {'KMGT'[power - 1]}iB"


def exact_bytes(n_bytes: int) -> str:
    """Return the shortest text that `parse_bytes` turns back into the same size, e.g. `500MB`."""
    units = [
        (size, letter + middle + "B")
        for power, letter in enumerate("KMGT", start=1)
        for size, middle in ((1000**power, ""), (1024**power, "i"))
    ]
    size, unit = max([each for each in units if n_bytes % each[0] == 0 and n_bytes] or [(1, "B")])
    return f"{n_bytes // size}{unit}"
