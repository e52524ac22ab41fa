"""Parses the header of one GGUF file: version, key-value pairs, tensor table.

Format: the GGUF specification, versions 2 and 3, little-endian. Offsets of tensors must follow
each other as every writer lays them out, so no two tensors can overlap and none can lie outside
the file.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.gguf.metadata import Metadata, StringArray, Value, ValueType
from fomoe.gguf.quants import UNSUPPORTED_TYPES, GGMLType, row_bytes
from fomoe.gguf.stream import HeaderStream

MAX_DIMS = 4
MAX_ENTRIES = 1 << 16  # key-value pairs, and tensors: a 1000-layer model has 30,000
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes with a terminating zero
MAX_KEY_BYTES = 65535
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

_DAMAGED = "the file is damaged, download it again"
_CONVERT = "convert the model again with a current llama.cpp"

_TYPE_IDS = frozenset(int(each) for each in GGMLType)
_SCALARS: dict[ValueType, tuple[struct.Struct, np.dtype[np.generic]]] = {
    ValueType.UINT8: (struct.Struct("<B"), np.dtype("<u1")),
    ValueType.INT8: (struct.Struct("<b"), np.dtype("<i1")),
    ValueType.UINT16: (struct.Struct("<H"), np.dtype("<u2")),
    ValueType.INT16: (struct.Struct("<h"), np.dtype("<i2")),
    ValueType.UINT32: (struct.Struct("<I"), np.dtype("<u4")),
    ValueType.INT32: (struct.Struct("<i"), np.dtype("<i4")),
    ValueType.UINT64: (struct.Struct("<Q"), np.dtype("<u8")),
    ValueType.INT64: (struct.Struct("<q"), np.dtype("<i8")),
    ValueType.FLOAT32: (struct.Struct("<f"), np.dtype("<f4")),
    ValueType.FLOAT64: (struct.Struct("<d"), np.dtype("<f8")),
    ValueType.BOOL: (struct.Struct("<B"), np.dtype("u1")),
}
# the least that a key-value pair and a tensor entry can take: length, 1 byte of name, type, value;
# length, 1 byte of name, n_dims, 1 dim, type, offset
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    `shape` is in NumPy order (slowest first; a matrix is [rows, columns]), `offset` is the
    absolute byte offset in file number `shard`.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says about itself; `size` is the file's size in bytes."""

    path: Path
    size: int
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]


def read_header(fd: int, path: Path, shard: int) -> Header:
    """Parse the header of the open file `fd`, which is file number `shard` of its model.

    Raises:
        GGUFError: the file is not a GGUF, is damaged, or holds something not supported.
    """
    status = os.fstat(fd)
    stream = HeaderStream(fd, path, status.st_size)
    if not stat.S_ISREG(status.st_mode):
        stream.fail("file", "not a regular file", "give the path of a .gguf file")
    _read_version(stream)
    n_tensors = _count(stream, "tensor count", _MIN_TENSOR_BYTES)
    n_pairs = _count(stream, "key-value count", _MIN_PAIR_BYTES)
    values: dict[str, Value] = {}
    for index in range(n_pairs):
        _read_pair(stream, index, values)
    metadata = Metadata(path, values)
    alignment = _alignment(metadata)
    entries: dict[str, _Entry] = {}
    for index in range(n_tensors):
        _read_tensor(stream, index, entries)
    tensors = _lay_out(stream, list(entries.values()), alignment, shard)
    return Header(path, stream.size, metadata, tensors)


def _read_version(stream: HeaderStream) -> None:
    magic = stream.take(4, "magic")
    if magic == b"vers":
        stream.fail("magic", "this is a Git LFS pointer, not the model", "run `git lfs pull`", 0)
    if magic != b"GGUF":
        stream.fail("magic", f"{magic!r} is not b'GGUF'", "give the path of a .gguf file", 0)
    at = stream.offset
    version = stream.u32("version")
    if version & 0xFFFF == 0 and version:
        stream.fail("version", "the file is big-endian", f"{_CONVERT} for little-endian", at)
    if version not in (2, 3):
        stream.fail("version", f"version {version}, only 2 and 3 are read", _CONVERT, at)


def _count(stream: HeaderStream, field: str, item_bytes: int) -> int:
    at = stream.offset
    count = stream.u64(field)
    if count > MAX_ENTRIES:
        stream.fail(field, f"{count:,}, at most {MAX_ENTRIES:,} are read", _DAMAGED, at)
    stream.need_items(count, item_bytes, field)
    return count


def _read_pair(stream: HeaderStream, index: int, values: dict[str, Value]) -> None:
    at = stream.offset
    field = f"key of pair {index}"
    key = stream.text(field, MAX_KEY_BYTES)
    if not key or not key.isprintable():
        stream.fail(field, f"{key[:80]!r} is empty or not printable", _DAMAGED, at)
    if key in values:
        stream.fail(key, "the key appears twice", _CONVERT, at)
    at = stream.offset
    kind = _value_type(stream, key)
    if kind is not ValueType.ARRAY:
        values[key] = Value(kind, False, _read_scalar(stream, key, kind), at)
        return
    element = _value_type(stream, f"{key} (element type)")
    count_at = stream.offset
    count = stream.u64(f"{key} (array length)")
    if element is ValueType.ARRAY:
        stream.fail(key, "an array of arrays", "no supported model needs one: " + _CONVERT, at)
    values[key] = Value(element, True, _read_array(stream, key, element, count, count_at), at)


def _value_type(stream: HeaderStream, field: str) -> ValueType:
    at = stream.offset
    number = stream.u32(field)
    try:
        return ValueType(number)
    except ValueError:
        stream.fail(field, f"unknown value type {number}", _DAMAGED, at)


def _read_scalar(stream: HeaderStream, key: str, kind: ValueType) -> int | float | bool | str:
    if kind is ValueType.STRING:
        return stream.text(key)
    at = stream.offset
    form, _ = _SCALARS[kind]
    value: int | float = form.unpack(stream.take(form.size, key))[0]
    if kind is not ValueType.BOOL:
        return value
    if value not in (0, 1):
        stream.fail(key, f"a boolean of value {value}", _DAMAGED, at)
    return bool(value)


def _read_array(
    stream: HeaderStream, key: str, element: ValueType, count: int, count_at: int
) -> StringArray | npt.NDArray[np.generic]:
    field = f"{key} (array of {count:,})"
    if element is ValueType.STRING:
        return StringArray(*stream.text_array(count, field))
    dtype = _SCALARS[element][1]
    numbers = np.frombuffer(stream.take(count * dtype.itemsize, field), dtype)
    if element is ValueType.BOOL and numbers.size and int(numbers.max()) > 1:
        stream.fail(key, f"a boolean of value {int(numbers.max())}", _DAMAGED, count_at)
    return numbers


def _alignment(metadata: Metadata) -> int:
    key = "general.alignment"
    alignment = metadata.int(key, hi=MAX_ALIGNMENT, default=DEFAULT_ALIGNMENT)
    if alignment < 8 or alignment & (alignment - 1):
        metadata.refuse(key, f"{alignment} is not a power of two of at least 8")
    return alignment


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the tensor table.

    `offset` counts from the start of the data; `at` is where that number stands in the file.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    at: int


def _read_tensor(stream: HeaderStream, index: int, entries: dict[str, _Entry]) -> None:
    at = stream.offset
    field = f"name of tensor {index}"
    name = stream.text(field, MAX_NAME_BYTES)
    if not name or not name.isprintable():
        stream.fail(field, f"{name!r} is empty or not printable", _DAMAGED, at)
    if name in entries:
        stream.fail(name, "the tensor appears twice", _CONVERT, at)
    dims = _read_dims(stream, name)
    qtype = _tensor_type(stream, name)
    columns = dims[0]
    if columns % qtype.block_elements:
        stream.fail(
            f"{name} (dimensions)",
            f"a row of {columns:,} does not divide into {qtype.name} blocks of "
            f"{qtype.block_elements}",
            _CONVERT,
        )
    at = stream.offset
    offset = stream.u64(f"{name} (offset)")
    nbytes = math.prod(dims[1:]) * row_bytes(qtype, columns)
    entries[name] = _Entry(name, qtype, tuple(reversed(dims)), offset, nbytes, at)


def _read_dims(stream: HeaderStream, name: str) -> list[int]:
    field = f"{name} (dimensions)"
    at = stream.offset
    n_dims = stream.u32(field)
    if not 1 <= n_dims <= MAX_DIMS:
        stream.fail(field, f"{n_dims} dimensions, 1 to {MAX_DIMS} are allowed", _DAMAGED, at)
    dims: list[int] = []
    elements = 1
    for _ in range(n_dims):
        at = stream.offset
        dim = stream.u64(field)
        elements *= dim
        if dim == 0 or elements >= 2**63:
            stream.fail(field, f"dimension {len(dims)} is {dim:,}", _DAMAGED, at)
        dims.append(dim)
    return dims


def _tensor_type(stream: HeaderStream, name: str) -> GGMLType:
    field = f"{name} (type)"
    at = stream.offset
    number = stream.u32(field)
    if number in UNSUPPORTED_TYPES:
        known = ", ".join(each.name for each in GGMLType)
        problem = f"{UNSUPPORTED_TYPES[number]} is not supported"
        stream.fail(field, problem, f"use a quantisation of these types: {known}", at)
    if number not in _TYPE_IDS:
        stream.fail(field, f"unknown tensor type {number}", _DAMAGED, at)
    return GGMLType(number)


def _lay_out(
    stream: HeaderStream, entries: list[_Entry], alignment: int, shard: int
) -> tuple[TensorInfo, ...]:
    data_start = _align(stream.offset, alignment)
    expected = 0
    tensors: list[TensorInfo] = []
    for entry in entries:
        field = f"{entry.name} (offset)"
        if entry.offset != expected:
            stream.fail(field, f"{entry.offset:,} instead of {expected:,}", _DAMAGED, entry.at)
        start = data_start + entry.offset
        if start + entry.nbytes > stream.size:
            stream.fail(
                field,
                f"{entry.nbytes:,} bytes from byte {start:,} pass the end of the file at "
                f"{stream.size:,}",
                "the download is not complete, fetch the rest",
                entry.at,
            )
        tensors.append(TensorInfo(entry.name, entry.type, entry.shape, shard, start, entry.nbytes))
        expected = _align(expected + entry.nbytes, alignment)
    return tuple(tensors)


def _align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
