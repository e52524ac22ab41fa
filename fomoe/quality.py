"""Quality as a contract: what an answer may lose against exact routing, or what it may read.

| text                  | what is held                                                       |
| --------------------- | ------------------------------------------------------------------ |
| `exact`               | the experts that the router chose, always                          |
| `kl=0.01`             | mean KL(exact, answer) of the next-token distribution, nats/token  |
| `bytes=500MB/token`   | mean expert bytes that a generated token asks of the drive         |
| `price=0.05`          | a fixed price of a read, as a share of a token's router mass       |
| `car=0.35`            | the original's cache-aware routing at this threshold               |
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fomoe.errors import ConfigError
from fomoe.units import exact_bytes, parse_bytes

Kind = Literal["exact", "kl", "bytes", "price", "car"]

ALLOWED = "exact, kl=0.01, bytes=500MB/token, price=0.05 or car=0.35"
_PER_TOKEN = "/token"
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_RANGES = {"kl": (1e-6, 10.0), "bytes": (1.0, 2.0**50), "price": (0.0, 1.0), "car": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Quality:
    """One contract; `Quality()` is exact, `str` gives the text that `parse_quality` takes.

    Attributes:
        kind: what is held.
        value: its figure in the table's unit, bytes as a whole number; 0 for `exact`.

    Raises ConfigError for a kind that is unknown or a figure out of its range.
    """

    kind: Kind = "exact"
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"quality {self.kind!r} is unknown; write {ALLOWED}")
        if self.kind == "exact":
            if self.value != 0.0:
                raise ConfigError(f"quality exact takes no figure, {self.value!r} is given")
            return
        low, high = _RANGES[self.kind]
        if not (low <= self.value <= high and self.value > 0.0):
            raise ConfigError(
                f"quality {self.kind}={self.value!r}: the figure must lie "
                + (f"from {low:g} to {high:g}" if low else f"above 0 and up to {high:g}")
            )
        if self.kind == "bytes" and self.value != int(self.value):
            raise ConfigError(f"quality bytes={self.value!r}: give whole bytes per token")

    @property
    def is_exact(self) -> bool:
        """Whether nothing may differ from the router's choice."""
        return self.kind == "exact"

    def __str__(self) -> str:
        if self.is_exact:
            return "exact"
        if self.kind == "bytes":
            return f"bytes={exact_bytes(int(self.value))}{_PER_TOKEN}"
        return f"{self.kind}={repr(float(self.value)).removesuffix('.0')}"


def parse_quality(text: str) -> Quality:
    """Return the contract of a text such as `exact`, `kl=0.01` or `bytes=0.5GB/token`.

    Raises:
        ConfigError: the text is none of the table's, or its figure is out of range.
    """
    kind, equals, figure = text.strip().partition("=")
    if (kind == "exact") == bool(equals) or kind not in get_args(Kind):
        raise ConfigError(f"quality {text!r} is not understood; write {ALLOWED}")
    if kind == "exact":
        return Quality()
    if kind == "bytes":
        return Quality("bytes", float(parse_bytes(figure.removesuffix(_PER_TOKEN))))
    if _NUMBER.fullmatch(figure) is None:
        raise ConfigError(f"quality {text!r}: {figure!r} is not a number; write {ALLOWED}")
    return Quality(kind, float(figure))  # type: ignore[arg-type]


def profile_beside(model: Path) -> Path | None:
    """Return the loss profile that lies beside a model file, `MODEL.loss.json`; None without."""
    path = model.parent / f"{model.stem}.loss.json"
    return path if path.is_file() else None


def read_sensitivities(path: Path) -> tuple[float, ...]:
    """Return the layers' sensitivities of a loss profile, `{"sensitivities": [1.0, ...]}`.

    A sensitivity is what a saved read costs in a layer, as a multiple of the layers' median;
    `benchmarks/layer_sensitivity.py` measures it.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["sensitivities"]
        if not isinstance(values, list):
            raise TypeError(f"sensitivities {values!r} are no list")
        return tuple(float(value) for value in values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a loss profile of a model ({error!r})") from None


def car_quality(threshold: float) -> Quality:
    """Return the contract that `--car` and the request field `car` are short for; 0 is exact.

    Raises:
        ConfigError: the threshold is not between 0 and 1.
    """
    number: Any = threshold
    if not isinstance(number, int | float) or not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"car is {threshold!r}; it must lie between 0 (exact) and 1")
    return Quality("car", float(threshold)) if threshold > 0.0 else Quality()
