"""The key-value part of a GGUF header, behind getters that check type and range."""

from __future__ import annotations

import builtins
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from fomoe.errors import GGUFError

_T = TypeVar("_T")


class ValueType(IntEnum):
    """The type tag of a metadata value (`gguf_type` of the GGUF specification)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


FLOAT_TYPES = frozenset({ValueType.FLOAT32, ValueType.FLOAT64})
INT_TYPES = frozenset(ValueType) - FLOAT_TYPES - {ValueType.BOOL, ValueType.STRING, ValueType.ARRAY}


@dataclass(frozen=True, slots=True)
class StringArray:
    """Strings as they lie in the file: `ends[i]` is where string i's bytes end in `data`."""

    data: bytes
    ends: array[int]

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self) -> Iterator[bytes]:
        """Each string's bytes."""
        start = 8
        for end in self.ends:
            yield self.data[start:end]
            start = end + 8


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value: a scalar, or an array when `is_array`; `offset` is where it begins."""

    type: ValueType
    is_array: bool
    data: int | float | bool | str | npt.NDArray[np.generic] | StringArray
    offset: int


class Metadata:
    """Typed access to the key-value pairs of a GGUF file.

    Every getter raises GGUFError naming the file, the key and its byte offset when the key is
    missing and no default is given, has another type, or lies outside the allowed range.
    """

    def __init__(self, path: Path, values: Mapping[str, Value]) -> None:
        self.path = path
        self._values = values

    def __contains__(self, key: object) -> builtins.bool:
        return key in self._values

    def __iter__(self) -> Iterator[builtins.str]:
        return iter(self._values)

    def __len__(self) -> builtins.int:
        return len(self._values)

    def is_array(self, key: builtins.str) -> builtins.bool:
        """Whether `key` exists and holds an array."""
        value = self._values.get(key)
        return value is not None and value.is_array

    def int(
        self,
        key: builtins.str,
        *,
        lo: builtins.int = 0,
        hi: builtins.int = 2**31 - 1,
        default: builtins.int | None = None,
    ) -> builtins.int:
        """The integer at `key`, within lo..hi (both included)."""
        value = self._scalar(key, default)
        if value is None:
            return self._given(key, default)
        if value.type not in INT_TYPES or not isinstance(value.data, int):
            self._wrong_type(key, value, "an integer")
        if not lo <= value.data <= hi:
            self.refuse(key, f"{value.data:,} is outside {lo:,} to {hi:,}")
        return value.data

    def float(self, key: builtins.str, *, default: builtins.float | None = None) -> builtins.float:
        """The finite floating-point number at `key`."""
        value = self._scalar(key, default)
        if value is None:
            return self._given(key, default)
        if not isinstance(value.data, float):
            self._wrong_type(key, value, "a floating-point number")
        if not math.isfinite(value.data):
            self.refuse(key, f"{value.data} is not a finite number")
        return value.data

    def bool(self, key: builtins.str, *, default: builtins.bool | None = None) -> builtins.bool:
        """The boolean at `key`."""
        value = self._scalar(key, default)
        if value is None:
            return self._given(key, default)
        if not isinstance(value.data, bool):
            self._wrong_type(key, value, "a boolean")
        return value.data

    def str(self, key: builtins.str, *, default: builtins.str | None = None) -> builtins.str:
        """The string at `key`."""
        value = self._scalar(key, default)
        if value is None:
            return self._given(key, default)
        if not isinstance(value.data, str):
            self._wrong_type(key, value, "a string")
        return value.data

    def strings(self, key: builtins.str) -> list[builtins.str]:
        """The array of strings at `key`, decoded now."""
        value = self._array(key)
        if not isinstance(value.data, StringArray):
            self._wrong_type(key, value, "an array of strings")
        texts: list[builtins.str] = []
        try:
            texts.extend(raw.decode("utf-8") for raw in value.data.raw())
        except UnicodeDecodeError as error:
            self.refuse(key, f"element {len(texts):,} is not valid UTF-8: {error.reason}")
        return texts

    def ints(self, key: builtins.str) -> npt.NDArray[np.int64]:
        """The array of integers at `key` as int64."""
        value = self._array(key)
        if value.type not in INT_TYPES or not isinstance(value.data, np.ndarray):
            self._wrong_type(key, value, "an array of integers")
        if value.type is ValueType.UINT64 and value.data.size and int(value.data.max()) >= 2**63:
            self.refuse(key, f"{int(value.data.max()):,} does not fit in 63 bits")
        return value.data.astype(np.int64)

    def floats(self, key: builtins.str) -> npt.NDArray[np.float64]:
        """The array of finite floating-point numbers at `key` as float64."""
        value = self._array(key)
        if value.type not in FLOAT_TYPES or not isinstance(value.data, np.ndarray):
            self._wrong_type(key, value, "an array of floating-point numbers")
        numbers = value.data.astype(np.float64)
        if not np.isfinite(numbers).all():
            self.refuse(key, "the array holds a number that is not finite")
        return numbers

    def refuse(self, key: builtins.str, problem: builtins.str) -> NoReturn:
        """Raise a GGUFError about the value of `key`, for checks that callers make themselves."""
        value = self._values.get(key)
        hint = "the file is damaged or made for another program, download or convert it again"
        raise GGUFError(self.path, key, 0 if value is None else value.offset, problem, hint)

    def _scalar(self, key: builtins.str, default: object) -> Value | None:
        value = self._values.get(key)
        if value is None:
            if default is None:
                self.refuse(key, "the key is missing")
            return None
        if value.is_array:
            self._wrong_type(key, value, "a single value")
        return value

    def _array(self, key: builtins.str) -> Value:
        value = self._values.get(key)
        if value is None:
            self.refuse(key, "the key is missing")
        if not value.is_array:
            self._wrong_type(key, value, "an array")
        return value

    def _given(self, key: builtins.str, default: _T | None) -> _T:
        if default is None:
            self.refuse(key, "the key is missing")
        return default

    def _wrong_type(self, key: builtins.str, value: Value, wanted: builtins.str) -> NoReturn:
        kind = f"array of {value.type.name}" if value.is_array else value.type.name
        self.refuse(key, f"the value is of type {kind}, {wanted} was expected")
