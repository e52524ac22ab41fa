"""Every message between processes, in one table.

Control messages are frozen dataclasses on msgpack; the layer step is fixed structs whose arrays
lie in an arena of the fabric (`layout.py`). Nothing here is pickled.

| tag      | from -> to        | carries                                   | answer          |
| -------- | ----------------- | ----------------------------------------- | --------------- |
| MESSAGE  | client <-> driver | a control message of this module          | events          |
| STEP     | driver -> device  | `STEP` struct, arrays in the step arena   | DONE            |
| DONE     | device -> driver  | `DONE` struct, result in the step arena   |                 |
| SWEEP    | driver -> device  | `STEP` struct: a wave of a prompt's sweep | DONE            |
| ABORT    | driver -> device  | u64 step id: stop waiting for its experts | DONE, aborted   |
| LAYERS   | driver -> device  | `LAYERS` struct: halves of layers to run, | DONE            |
|          |                   | and what must be copied for them          |                 |
| COPY     | driver -> device  | array of `COPY`: an ahead list            | COPIED          |
| COPIED   | device -> driver  | array of `COPY`: those that have ended    |                 |
| FORESEEN | device -> driver  | `FORESEEN`: what a layer's router says of |                 |
|          |                   | the stream that goes into it, in the arena|                 |
| FAULT    | device -> driver  | UTF-8: why the device cannot go on        |                 |
| ARM      | driver -> storage | `ARM` struct: experts to compute in RAM   | word of the sum |
| ABORT    | driver -> storage | u64 step id: compute nothing for it       | word of the sum |
| FETCH    | driver -> storage | array of `READ` records                   | landed words    |
| DROP     | driver -> storage | u32: forget the layer's unbegun prefetches| DROPPED         |
| PRELOADED| storage -> driver | u32: preload jobs that have landed        |                 |
| FAILED   | storage -> driver | `ReadFailed`                              |                 |
| DROPPED  | storage -> driver | array of `DROPPED`: prefetches never read |                 |

An ABORT gives up all steps up to that id, but to a `cpu` device only that one. `COPY` and `ENTRY`
are those of `fomoe.engine`. A landed read is announced by no message: storage writes the job's
generation into the slot's landed word in the shared segment and rings the device's bell. Nor is
what storage has computed: the sum and then the step's id go into the arena of the device, whose
bell rings.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, TypeVar

import msgpack

from fomoe.engine.requests import (
    EngineStatus,
    Finished,
    GenerateRequest,
    PromptLogprobs,
    PromptProgress,
    Receipt,
    SamplingParams,
    TokenEvent,
)


class Tag(IntEnum):
    """First word of every ring message."""

    MESSAGE = 1
    MESSAGE_PART = 2  # more of the same message follows
    STEP = 3
    DONE = 4
    ABORT = 5
    FETCH = 6
    DROP = 7
    PRELOADED = 8
    FAILED = 9
    SWEEP = 10
    DROPPED = 11
    LAYERS = 12
    COPY = 13
    COPIED = 14
    FAULT = 15
    FORESEEN = 16
    ARM = 17


class Do:
    """What a LAYERS message asks for, as bits; a device does it in this order.

    Plain numbers: an `IntFlag` takes microseconds where a layer has some tens.
    """

    COPY_STATE = 1  # make state `state` what state `peer` is after `position` tokens
    BEGIN = 2  # a pass begins: `tokens` tokens from `position` on, of state `state`
    WHOLE = 4  # and is run through all layers by the router's own choice, which is the answer
    EMBED = 8  # the residual stream is the embedding of the arena's tokens
    TAKE = 16  # or what lies in the arena of device `peer`, once its word has reached `awaited`
    BACK = 32  # run the experts that the arena has and close `layer`
    CHOOSE = 64  # with BACK: those that the router chose on the device
    FRONT = 128  # begin `layer`, after BACK the one behind it, and answer with its scores
    # Put the residual stream (of experts alone: their sums) into the arena, the step's id into its
    # word, ring `peer`, if that is another device.
    GIVE = 256
    LOGITS = 512  # answer with the logits of the arena's first `rows` row numbers
    LARGEST = 1024  # answer with the greatest logit of the first of them, and whose it is
    GATHER = 2048  # begin a prompt's experts: the router's choice, sorted by expert
    WAVE = 4096  # run those of them that the message's entries name
    COMBINE = 8192  # and close `layer` once all have run
    PART = 16384  # with BACK: the arena has a part of the experts, storage's sum is added to it
    INPUT = 32768  # with FRONT: a token's experts' input goes into the arena, for storage


class Priority(IntEnum):
    """Order in which storage serves jobs; a smaller number goes first."""

    DEMAND = 0
    PREFETCH = 1
    PRELOAD = 2
    BACKGROUND = 3  # as a prefetch, but not to be forgotten


# step id u64, layer, tokens, top_k, first entry, entries, flags, buffer: i32
STEP = struct.Struct("<Qiiiiiii")
STEP_FIRST, STEP_LAST = 1, 2
# step id u64, aborted i32, experts computed i32, nanoseconds computing u64, waiting u64
DONE = struct.Struct("<QiiQQ")
STEP_ID = struct.Struct("<Q")
FORESEEN = struct.Struct("<i")  # layer
# step id u64, awaited u64, flags (`Do`), layer, tokens, position, state, peer, rows: i32; then how
# many records of `COPY` and of `ENTRY` follow
LAYERS = struct.Struct("<QQiiiiiiiii")
# step id u64, layer, device, experts: i32; then their weights float32 and `ENTRY` records, whose
# slots are the segment's
ARM = struct.Struct("<Qiii")
COUNT = struct.Struct("<I")
DROPPED = struct.Struct("<iiiQ")  # layer, expert, slot, generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Client -> driver: the reader of this request has gone."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRequest:
    """Client -> driver: the logits of a sequence, answered by `LogitsRows`, then `Finished`."""

    request_id: str
    tokens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRows:
    """Driver -> client: rows `start`.. of the logits, float32 little-endian, row by row."""

    request_id: str
    start: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFailed:
    """Storage -> driver: an expert could not be read after retries."""

    layer: int
    expert: int
    slot: int
    generation: int
    prefetch: bool
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest:
    """Client -> driver: answer with an `EngineStatus` as soon as the present step ends."""

    nonce: int


Message = (
    Cancel | EngineStatus | Finished | GenerateRequest | LogitsRequest | LogitsRows
    | PromptLogprobs | PromptProgress | ReadFailed | StatusRequest | TokenEvent
)  # fmt: skip

_TYPES: tuple[type, ...] = (
    Cancel, EngineStatus, Finished, GenerateRequest, LogitsRequest, LogitsRows,
    PromptLogprobs, PromptProgress, ReadFailed, StatusRequest, TokenEvent,
)  # fmt: skip
_BY_NAME = {kind.__name__: kind for kind in _TYPES}
_NESTED = {"sampling": SamplingParams, "receipt": Receipt}
_NAMES = {kind: tuple(part.name for part in fields(kind)) for kind in (*_TYPES, *_NESTED.values())}

_T = TypeVar("_T")


def encode(message: Message) -> bytes:
    """Return the wire form: msgpack of [type name, fields]."""
    return bytes(msgpack.packb([type(message).__name__, _plain(message)]))


def decode(data: bytes | memoryview) -> Message:
    """Return the message of a wire form; anything else, or unknown fields, raise ValueError."""
    try:
        name, values = msgpack.unpackb(data, strict_map_key=False)
        return _build(_BY_NAME[name], values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a message of fomoe: {error!r}") from error


def _plain(value: Any) -> dict[str, Any]:
    out = {}
    for name in _NAMES[type(value)]:
        item = getattr(value, name)
        if name in _NESTED:
            item = _plain(item)
        elif isinstance(item, frozenset):
            item = sorted(item)
        out[name] = item
    return out


def _build(kind: type[_T], values: dict[str, Any]) -> _T:
    for name, nested in _NESTED.items():
        if name in values:
            values[name] = _build(nested, values[name])
    if "stop_ids" in values:
        values["stop_ids"] = frozenset(values["stop_ids"])
    if kind is TokenEvent:
        values["top"] = [(i, p) for i, p in values["top"]]
    elif kind is PromptLogprobs:
        values["top"] = [[(i, p) for i, p in row] for row in values["top"]]
    return kind(**values)
