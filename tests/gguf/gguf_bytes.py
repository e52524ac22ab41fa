"""Writes GGUF files byte by byte, so that any field of them can be wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMS = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<B",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}
Q8_0, Q4_K = 8, 12


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: float) -> bytes:
    return struct.pack(_FORMS[kind], value)


def pair(key: str | bytes, kind: int, value: float | str | bytes) -> bytes:
    if kind == STRING:
        payload = text(value)
    elif isinstance(value, bytes):
        payload = value
    else:
        payload = scalar(kind, value)
    return text(key) + struct.pack("<I", kind) + payload


def array(key: str, kind: int, payload: bytes, count: int) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, kind, count) + payload


def strings(key: str, values: list[str | bytes]) -> bytes:
    return array(key, STRING, b"".join(text(each) for each in values), len(values))


def tensor(
    name: str | bytes,
    dims: tuple[int, ...] = (32, 2),
    kind: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return (
        text(name)
        + struct.pack("<I", count)
        + b"".join(struct.pack("<Q", dim) for dim in dims)
        + struct.pack("<IQ", kind, offset)
    )


@dataclass(kw_only=True)
class File:
    """A small valid file unless told otherwise: two keys and two tensors of 256 bytes."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[bytes] = field(
        default_factory=lambda: [
            pair("general.architecture", STRING, "qwen35moe"),
            pair("qwen35moe.block_count", U32, 2),
        ]
    )
    tensors: list[bytes] = field(
        default_factory=lambda: [tensor("a.weight"), tensor("b.weight", offset=256)]
    )
    n_pairs: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    data: bytes = bytes(range(256)) * 2

    def header(self) -> bytes:
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        return (
            self.magic
            + struct.pack("<IQQ", self.version, n_tensors, n_pairs)
            + b"".join(self.pairs)
            + b"".join(self.tensors)
        )

    def build(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def reset_peak() -> None:
    """Let the peak of this process's memory start again from what it uses now (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process had since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")
