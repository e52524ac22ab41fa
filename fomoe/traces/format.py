"""The trace file: a header that describes a model, then records of one size, one per token.

All numbers are little-endian.

| offset | type    | header                                                                   |
| ------ | ------- | ------------------------------------------------------------------------ |
| 0      | char[8] | `FOMOETRC`                                                               |
| 8      | u32     | version, 1                                                               |
| 12     | u32     | bytes of the header, where the first record begins; a multiple of 64     |
| 16     | u32     | bytes of a record                                                        |
| 20     | u32     | CRC-32 of the facts                                                      |
| 24     | u32     | bytes of the facts                                                       |
| 28     | char[]  | facts: UTF-8 JSON with the fields of `TraceFacts`, then zeros            |

| type     | name          | record                                                              |
| -------- | ------------- | ------------------------------------------------------------------- |
| u32      | crc           | CRC-32 of all bytes of the record after this field                  |
| u32      | flags         | bit 0: a prompt's token (prefill), not one that was fed in decode   |
| u32      | sequence      | number of the text; those of one number follow each other in order  |
| i32      | token         | the token whose rows these are                                      |
| i32      | position      | its place in the text, from 0                                       |
| i32      |               | 0                                                                   |
| u64      | hash          | decision hash after this token; 0 where it was not known            |
| char[48] | label         | name of the text, UTF-8, zeros behind                               |
| char[32] | domain        | kind of the text, UTF-8, zeros behind                               |
| f32[L]   | tail          | probability of all experts that are not candidates                  |
| u16[L,C] | ids           | the C = min(64, E) likeliest experts, by falling score, then id     |
| f16[L,C] | probabilities | theirs, softmax over all E, rounded to nearest even                 |

Every record says by itself which text it belongs to, so that whatever of a file was written can be
read: a writer that is killed leaves whole records and at most one torn one at the end.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.errors import ConfigError, TraceError

MAGIC = b"FOMOETRC"
VERSION = 1
MOST_CANDIDATES = 64
LABEL_BYTES = 48
DOMAIN_BYTES = 32
PROMPT = 1  # bit of `flags`
PREFIX = struct.Struct("<8s5I")
_ALIGN = 64
_MOST_HEADER_BYTES = 1 << 20
_MOST = 1 << 16  # layers and experts, so that their product bounds a record


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFacts:
    """The model that a trace is of.

    Attributes:
        model: its name, for people.
        n_layers: MoE layers, L.
        n_experts: experts of a layer, E.
        top_k: experts that the exact router takes per token.
        expert_bytes: bytes of one expert of each layer.
    """

    model: str
    n_layers: int
    n_experts: int
    top_k: int
    expert_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = {"n_layers": self.n_layers, "n_experts": self.n_experts, "top_k": self.top_k}
        for name, value in sizes.items():
            if not _is_whole(value) or not 1 <= value <= _MOST:
                raise ConfigError(f"{name} is {value!r}; a trace has 1 to {_MOST:,}")
        if not isinstance(self.model, str):
            raise ConfigError(f"model is {self.model!r}; a trace has a name there")
        if self.top_k > self.candidates:
            raise ConfigError(
                f"{self.top_k} experts per token of {self.n_experts}: a trace keeps "
                f"{self.candidates} candidates of a row, give no more than these"
            )
        object.__setattr__(self, "expert_bytes", tuple(self.expert_bytes))
        right = all(_is_whole(size) and size >= 0 for size in self.expert_bytes)
        if not right or len(self.expert_bytes) != self.n_layers:
            raise ConfigError(
                f"expert_bytes names {len(self.expert_bytes)} sizes of experts for "
                f"{self.n_layers} layers; give one whole number for each"
            )

    @property
    def candidates(self) -> int:
        """How many experts of a row a trace keeps, C."""
        return min(MOST_CANDIDATES, self.n_experts)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def record_type(facts: TraceFacts) -> np.dtype[np.void]:
    """Return the type of a record; numpy pads nothing, the last field is rounded up to 8 bytes."""
    rows = (facts.n_layers, facts.candidates)
    parts: list[Any] = [
        ("crc", "<u4"), ("flags", "<u4"), ("sequence", "<u4"), ("token", "<i4"),
        ("position", "<i4"), ("zero", "<i4"), ("hash", "<u8"), ("label", f"S{LABEL_BYTES}"),
        ("domain", f"S{DOMAIN_BYTES}"), ("tail", "<f4", (facts.n_layers,)), ("ids", "<u2", rows),
        ("probabilities", "<f2", rows),
    ]  # fmt: skip
    # Every field begins at a multiple of its own size, so that mapped arrays are aligned.
    excess = np.dtype(parts).itemsize % 8
    return np.dtype([*parts, ("pad", "V4")] if excess else parts)


def record_crc(record: np.ndarray[Any, np.dtype[np.void]]) -> int:
    """Return what the `crc` field of one record, an array of one, must be."""
    return zlib.crc32(record.view(np.uint8)[4:].data)


def pack_header(facts: TraceFacts) -> bytes:
    """Return the header of a file of these facts."""
    text = json.dumps(asdict(facts)).encode()
    size = -(-(PREFIX.size + len(text)) // _ALIGN) * _ALIGN
    prefix = PREFIX.pack(
        MAGIC, VERSION, size, record_type(facts).itemsize, zlib.crc32(text), len(text)
    )
    return (prefix + text).ljust(size, b"\0")


def read_header(path: Path) -> tuple[TraceFacts, int]:
    """Return a file's facts and the number of bytes of its header.

    Raises:
        TraceError: it cannot be read, is no trace, is of another version, or is damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(PREFIX.size)
            _check_start(path, start)
            _, _, size, record_bytes, crc, length = PREFIX.unpack(start)
            if not PREFIX.size + length <= size <= _MOST_HEADER_BYTES:
                raise TraceError(path, f"a header of {size:,} bytes", "the file is damaged")
            text = file.read(size - PREFIX.size)
    except OSError as error:
        raise TraceError(path, f"cannot be read ({error.strerror})", "name a trace") from None
    if len(text) < size - PREFIX.size:
        raise TraceError(
            path, f"ends after {len(start) + len(text):,} of {size:,} bytes of its header",
            "record it again",
        )  # fmt: skip
    if zlib.crc32(text[:length]) != crc:
        raise TraceError(path, "its header does not match its checksum", "the file is damaged")
    facts = _facts_of(path, text[:length])
    wanted = record_type(facts).itemsize
    if record_bytes != wanted:
        raise TraceError(
            path, f"records of {record_bytes:,} bytes where its facts make {wanted:,}",
            "the file is damaged",
        )  # fmt: skip
    return facts, size


def _check_start(path: Path, start: bytes) -> None:
    if not start.startswith(MAGIC):
        raise TraceError(
            path, f"begins with {start[:8]!r}, not with {MAGIC!r}: it is no trace",
            "record one with --trace FILE",
        )  # fmt: skip
    if len(start) < PREFIX.size:
        raise TraceError(path, f"ends after {len(start)} bytes", "record it again")
    version = PREFIX.unpack(start)[1]
    if version != VERSION:
        raise TraceError(
            path, f"is a trace of version {version}, this fomoe reads version {VERSION}",
            "record it again, or read it with the fomoe that wrote it",
        )  # fmt: skip


def _facts_of(path: Path, text: bytes) -> TraceFacts:
    known = {part.name for part in fields(TraceFacts)}
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != known:
            raise ValueError(f"the facts must be {', '.join(sorted(known))}")
        return TraceFacts(**values)
    except (ValueError, TypeError, ConfigError) as error:
        raise TraceError(path, f"its header makes no sense ({error})", "record it again") from None


def pack_name(text: str, n_bytes: int) -> bytes:
    """Return a label in at most `n_bytes` of UTF-8, cut between characters; no zeros in it."""
    cut = text.replace("\0", "").encode(errors="replace")[:n_bytes]
    return cut.decode(errors="ignore").encode()
