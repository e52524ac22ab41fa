"""Checks of options: a value that is wrong raises with its name and what to write instead."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, get_args

from fomoe.errors import ConfigError

_LEAST_SENSITIVE = 1e-3
_MOST_BACKFILL, _MOST_PARTS = 64, 10**6


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(name: str, value: str, literal: Any) -> None:
    """Require one of the values of a Literal."""
    choices = get_args(literal)
    require(value in choices, f"{name} is {value!r}; choose one of {', '.join(choices)}")


def require_range(name: str, value: Any, low: int, high: int) -> None:
    """Require a whole number from `low` to `high`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    require(
        is_integer and low <= value <= high,
        f"{name} is {value!r}; it must be a whole number from {low:,} to {high:,}",
    )


def require_sensitivities(values: tuple[Any, ...]) -> None:
    """Require what a substitution may cost in a layer, as a multiple of an average one."""
    wrong = [value for value in values if not _is_sensitivity(value)]
    require(
        not wrong,
        f"a layer's sensitivity is {wrong[:1]}; it must lie between {_LEAST_SENSITIVE} and "
        f"{1 / _LEAST_SENSITIVE:.0f}",
    )


def _is_sensitivity(value: Any) -> bool:
    is_number = isinstance(value, (int, float))
    return is_number and _LEAST_SENSITIVE <= value <= 1 / _LEAST_SENSITIVE


def require_share(name: str, value: Any) -> None:
    """Require experts per layer and token, as a number or a fraction."""
    try:
        share = Fraction(value)
    except (TypeError, ValueError, ZeroDivisionError):
        share = Fraction(-1)
    require(
        0 <= share <= _MOST_BACKFILL and share.denominator <= _MOST_PARTS,
        f"{name} is {value!r}; give experts per layer and token, 0 to {_MOST_BACKFILL} and no "
        "finer than a millionth, for example 0.5 or 28/60",
    )


def require_arm(name: str, value: Any) -> None:
    """Require `off`, `auto`, or how many of 0, 1, 2 .. experts stay: never more than there are."""
    if value in ("off", "auto"):
        return
    words = value.split() if isinstance(value, str) else []
    require(
        bool(words) and all(w.isdecimal() and int(w) <= n for n, w in enumerate(words)),
        f"{name} is {value!r}; give off, auto, or a receipt's table: how many of 0, 1, 2 .. "
        "experts stay in RAM, for example '0 0 1 1 2'",
    )
