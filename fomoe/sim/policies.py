"""Specs of policies: a routing rule and what the logical caches do, as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_args

from fomoe.errors import ConfigError
from fomoe.residency.logical import Eviction, LogicalRules
from fomoe.routing.rules import CacheAwareRouting, DropRouting, ExactRouting, PriceRouting
from fomoe.sim.strengths import Rule
from fomoe.units import parse_bytes

_RULES: dict[str, Callable[..., Rule]] = {
    "car": CacheAwareRouting,
    "price": PriceRouting,
    "bytes": lambda _, **options: PriceRouting(0.0, **options),
    "drop": DropRouting,
}
_OF_RULE: dict[str, Callable[[str], Any]] = {"protected": int, "kappa": float, "budget": int}
_OF_CACHES: dict[str, Callable[[str], Any]] = {
    "background": Fraction, "delay": int, "decay": Fraction, "shift": int,
}  # fmt: skip
_HELP = (
    "write a rule (exact, car=0.35, price=0.05, bytes=500MB/token, drop=0.1 or belady) and, with + "
    "between them, what goes with it: lru, lfru or mass; protected=N, kappa=X or renormalise; "
    "background=N (reads per layer and token), delay=N, decay=X, shift=N; for example "
    "price=0.05+lfru+kappa=0"
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What is scored.

    Attributes:
        text: the spec, as it was written.
        rule: what chooses experts; None for the offline optimum of exact routing.
        caches: what `LogicalRules` gets besides the capacity.
        budget_bytes: per token, which the rule's price is steered by; 0 where it is not.
    """

    text: str
    rule: Rule | None
    caches: tuple[tuple[str, Any], ...] = ()
    budget_bytes: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether it runs what the router chose."""
        return self.rule is None or isinstance(self.rule, ExactRouting)

    def logical_rules(self, capacity: int) -> LogicalRules:
        """Return how the caches behave.

        Raises:
            ConfigError: a number is out of range.
        """
        return LogicalRules(capacity=capacity, **dict(self.caches))


def parse_policy(text: str) -> Policy:
    """Return the policy of a spec such as `lfru`, `car=0.35+lru+background=0.5` or `belady`.

    The rule is exact and the eviction LRU where the spec names none.

    Raises:
        ConfigError: a part is unknown, given twice, does not go with the others, or has no number
            where it needs one.
    """
    caches: dict[str, Any] = {}
    options: dict[str, Any] = {}
    strengths: dict[str, float] = {}
    for part in text.split("+"):
        name, _, value = part.partition("=")
        if part in get_args(Eviction):
            _put(caches, "eviction", part, text)
        elif part in ("exact", "belady"):
            _put(strengths, part, 0.0, text)
        elif part == "renormalise":
            _put(options, part, True, text)
        elif name in _RULES:
            _put(strengths, name, _number(_budget if name == "bytes" else float, value, part), text)
        elif name in _OF_RULE:
            _put(options, name, _number(_OF_RULE[name], value, part), text)
        elif name in _OF_CACHES:
            key = "backfill" if name == "background" else name
            _put(caches, key, _number(_OF_CACHES[name], value, part), text)
        else:
            raise ConfigError(f"{part!r} in policy {text!r} is unknown; {_HELP}")
    return _policy(text, strengths, options, caches)


def _put(values: dict[str, Any], name: str, value: Any, text: str) -> None:
    if name in values:
        raise ConfigError(f"policy {text!r} gives {name} twice; keep one")
    values[name] = value


def _number(kind: Callable[[str], Any], value: str, part: str) -> Any:
    try:
        return kind(value)
    except (ValueError, ZeroDivisionError, ConfigError):
        raise ConfigError(f"{part!r} has no number behind the =; {_HELP}") from None


def _budget(text: str) -> float:
    return float(parse_bytes(text.removesuffix("/token")))


def _policy(
    text: str, strengths: dict[str, float], options: dict[str, Any], caches: dict[str, Any]
) -> Policy:
    if len(strengths) > 1:
        raise ConfigError(f"policy {text!r} has {len(strengths)} rules; keep one")
    name, strength = next(iter(strengths.items()), ("exact", 0.0))
    others = [part for part in text.split("+") if part != "belady"]
    if name not in _RULES and (refused := others if name == "belady" else list(options)):
        raise ConfigError(f"policy {text!r}: {name} does not take {', '.join(refused)}; {_HELP}")
    caches.setdefault("eviction", "lru")
    if name not in _RULES:
        return Policy(text, None if name == "belady" else ExactRouting(), tuple(caches.items()))
    try:
        rule = _RULES[name](strength, **options)
    except TypeError:  # an option that the rule has no field for
        raise ConfigError(
            f"policy {text!r}: {name} does not take {', '.join(options)}; {_HELP}"
        ) from None
    budget = int(strength) if name == "bytes" else 0
    if name == "bytes" and budget < 1:
        raise ConfigError(f"policy {text!r}: give a budget of at least one byte per token")
    return Policy(text, rule, tuple(caches.items()), budget)
