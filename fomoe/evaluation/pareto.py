"""Quality lost against bytes read per token: the points of a Pareto plot, and their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fomoe.errors import ConfigError

FORMAT = "fomoe-pareto"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A mean in nats or as a share, with the ends of its interval (95 % unless stated)."""

    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.mean <= self.high:
            raise ConfigError(f"interval {self.low} to {self.high} does not hold {self.mean}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBytes:
    """Bytes read from the drive per decoded token, by cause."""

    demand: float
    background: float = 0.0
    prefetch: float = 0.0
    shadow: float = 0.0

    @property
    def total(self) -> float:
        """What the drive moves for one token."""
        return self.demand + self.background + self.prefetch + self.shadow


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One way of running the model on the same texts.

    A smaller quantisation that runs exactly is a point like any other: its excess is its own NLL
    minus that of the reference file in exact mode, its bytes are what it reads.

    Attributes:
        name: What was asked for, for example `car=0.35` or `Q3_K_M`; stands beside the point.
        series: Points of one series are joined by a line and share a colour.
        read: Bytes per token.
        excess: Mean NLL per token minus exact mode's, nats.
        kl: Mean KL(exact || this) in nats, where full logits were compared.
        null_kl: The same of the count-matched null.
        top1: Share of tokens with the same likeliest token.
        documents: Documents scored.
        tokens: Tokens scored.
        notes: Anything else, as text; goes into the file only.
    """

    name: str
    series: str
    read: ReadBytes
    excess: Measured
    kl: Measured | None = None
    null_kl: Measured | None = None
    top1: float | None = None
    documents: int = 0
    tokens: int = 0
    notes: dict[str, str] = field(default_factory=dict)


def front(points: Sequence[ParetoPoint]) -> list[bool]:
    """Return for each point whether no other one has at most its bytes and at most its excess.

    Of points that are equal in both, each is on the front. Intervals are not looked at.
    """
    cost = [(point.read.total, point.excess.mean) for point in points]
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in cost) for a, b in cost]


def to_json(points: Sequence[ParetoPoint]) -> str:
    """Return the points as JSON text; byte totals and the front are written beside them."""
    rows = [
        asdict(point) | {"bytes_per_token": point.read.total, "on_front": on_front}
        for point, on_front in zip(points, front(points), strict=True)
    ]
    return json.dumps({"format": FORMAT, "version": VERSION, "points": rows}, indent=1) + "\n"


def from_json(text: str) -> list[ParetoPoint]:
    """Return the points of `to_json`'s text.

    Raises:
        ConfigError: it is not such a text, or a field is missing or unknown.
    """
    try:
        data = json.loads(text)
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ConfigError(
                f"points of {data['format']!r} version {data['version']!r}; "
                f"this reads {FORMAT!r} version {VERSION}"
            )
        return [_point(row) for row in data["points"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"these are no Pareto points: {error}") from None


def _point(row: dict[str, Any]) -> ParetoPoint:
    fields = dict(row)
    for derived in ("bytes_per_token", "on_front"):
        fields.pop(derived, None)
    fields["read"] = ReadBytes(**fields["read"])
    for name in ("excess", "kl", "null_kl"):
        if fields.get(name) is not None:
            fields[name] = Measured(**fields[name])
    return ParetoPoint(**fields)


def read_points(path: Path) -> list[ParetoPoint]:
    """Return the points of a file.

    Raises:
        ConfigError: the file cannot be read or holds something else; names the file.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None
