"""TOML tables to dataclasses, strictly: nothing unknown, nothing missing, numbers with a source."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from fomoe.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Part = TypeVar("_Part", bound="Part")
_KINDS: dict[str, Any] = {"float": int | float, "int": int, "bool": bool, "str": str}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A table of numbers that are greater than 0, or 0 where a field's default is."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not (value > 0 or value == field.default == 0):
                raise ConfigError(f"{field.name} = {value}: must be greater than 0")


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from None


def part_of(kind: type[_Part], table: Any, where: str, sources: dict[str, str]) -> _Part:
    """Read one table; `where` names it in errors and in `sources`, which gets its reasons.

    Every `float` needs an entry of its name under `source`.

    Raises:
        ConfigError: a key is unknown or missing, a value is of the wrong type or has no source.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table")
    values = dict(table)
    reasons = values.pop("source", {})
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(values.keys() - known.keys())
    lacking = sorted(n for n, f in known.items() if f.default is MISSING and n not in values)
    if unknown or lacking or not isinstance(reasons, dict):
        raise ConfigError(f"{where}: unknown: {unknown}; missing: {lacking}; source is a table")
    stray = sorted(reasons.keys() - values.keys())
    if stray:
        raise ConfigError(f"{where}.source: nothing is called {stray}")
    for key, value in values.items():
        wanted = str(known[key].type)
        if not isinstance(value, _KINDS[wanted]) or (wanted != "bool" and isinstance(value, bool)):
            raise ConfigError(f"{where}.{key} = {value!r}: must be of type {wanted}")
        if wanted == "float" and not str(reasons.get(key, "")).strip():
            raise ConfigError(f"{where}.{key} has no source: add it to [{where}.source]")
    sources |= {f"{where}.{key}": str(reason) for key, reason in reasons.items()}
    return kind(**{k: float(v) if known[k].type == "float" else v for k, v in values.items()})
