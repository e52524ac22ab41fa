"""GGUF metadata made from Python values, without a file."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.gguf.metadata import Metadata, StringArray, Value, ValueType


def metadata_of(values: Mapping[str, Any]) -> Metadata:
    return Metadata(Path("fake.gguf"), {key: _value(item) for key, item in values.items()})


def _value(item: Any) -> Value:
    if isinstance(item, bool):
        return Value(ValueType.BOOL, False, item, 24)
    if isinstance(item, int):
        return Value(ValueType.UINT32, False, item, 24)
    if isinstance(item, str):
        return Value(ValueType.STRING, False, item, 24)
    if item and isinstance(item[0], str):
        return Value(ValueType.STRING, True, _strings(item), 24)
    return Value(ValueType.INT32, True, np.array(item, np.int32), 24)


def _strings(texts: list[str]) -> StringArray:
    data, ends = b"", array("Q")
    parts: list[bytes] = []
    size = 0
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        parts += [len(raw).to_bytes(8, "little"), raw]
        size += 8 + len(raw)
        ends.append(size)
    data = b"".join(parts)
    return StringArray(data, ends)
