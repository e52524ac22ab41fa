"""Every message comes back as it was; whatever else arrives is refused."""

import dataclasses
import re
import typing

import msgpack
import numpy as np
import pytest

from fomoe.actors import messages
from fomoe.actors.messages import (
    DONE,
    STEP,
    Cancel,
    LogitsRequest,
    LogitsRows,
    Message,
    Priority,
    ReadFailed,
    StatusRequest,
    Tag,
    decode,
    encode,
)
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
from fomoe.engine.transfers import READ

RECEIPT = Receipt(
    **{
        f.name: {
            "int": i + 1,
            "float": i + 0.5,
            "str": f"s{i}",
            "dict[str, float]": {"part": i + 0.25},
        }[f.type]
        for i, f in enumerate(dataclasses.fields(Receipt))
    }
)
EXAMPLES = [
    Cancel(request_id="a"),
    EngineStatus(state="loading", load_progress=0.25, running=1, queued=2, detail="d",
                 counters={'fomoe_x{tier="ram"}': 1.5}),
    EngineStatus(state="stopped"),
    Finished(request_id="ü", reason="stop", stop_id=0, receipt=RECEIPT),
    Finished(request_id="b", reason="error", error="disk: gone"),
    GenerateRequest(
        request_id="c", prompt=[0, 248_319], max_tokens=7, min_tokens=2, stop_ids=frozenset({9, 4}),
        sampling=SamplingParams(temperature=0.1, top_k=3, logit_bias={5: -1.5, 100_000: 2.0},
                                seed=2**64 - 1),
        logprobs=3, echo=True, quality="kl=0.01", forced=[7, 8],
    ),
    GenerateRequest(request_id="d", prompt=[], max_tokens=0),
    LogitsRequest(request_id="e", tokens=list(range(300))),
    LogitsRows(request_id="f", start=64, data=bytes(range(256))),
    PromptLogprobs(request_id="g", logprobs=[None, -0.5], top=[[], [(3, -0.5), (1, -2.25)]]),
    PromptProgress(request_id="h", total=9, processed=4, cached=1, time_ms=0.125),
    ReadFailed(layer=1, expert=2, slot=3, generation=2**40, message="blk.1 at byte 5",
               prefetch=True),
    StatusRequest(nonce=3),
    TokenEvent(request_id="i", token=17, logprob=-1e-300, top=[(17, -0.1), (2, -3.0)]),
    TokenEvent(request_id="j", token=0),
]  # fmt: skip


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message):
    data = encode(message)
    again = decode(data)
    assert again == message
    assert type(again) is type(message)
    assert decode(memoryview(bytearray(data))) == message


def test_there_is_an_example_of_every_type():
    assert {type(m) for m in EXAMPLES} == set(typing.get_args(Message))
    assert set(messages._TYPES) == set(typing.get_args(Message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_messages_are_frozen_and_keyword_only(message):
    kind = type(message)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, dataclasses.fields(message)[0].name, "x")
    with pytest.raises(TypeError):
        kind(*[getattr(message, f.name) for f in dataclasses.fields(message)])


def test_control_messages_say_who_sends_them_to_whom():
    of_this_module = [k for k in messages._TYPES if k.__module__ == messages.__name__]
    assert Cancel in of_this_module
    for kind in of_this_module:
        assert re.match(r"(Client|Driver|Storage|Device) -> (client|driver|storage|device): \S",
                        kind.__doc__), kind  # fmt: skip


def test_the_table_of_messages_names_every_tag():
    rows = re.findall(r"^\| (\w+) *\|", messages.__doc__, re.MULTILINE)
    assert set(rows) - {"tag"} == {tag.name for tag in Tag} - {"MESSAGE_PART"}


WRONG = {
    "unknown type": ["Shutdown", {}],
    "unknown field": ["Cancel", {"request_id": "a", "force": True}],
    "missing field": ["Cancel", {}],
    "unknown field inside": [
        "Finished", {"request_id": "a", "reason": "stop", "receipt": {"joules": 3}},
    ],
    "no pair": ["Cancel"],
    "a type that cannot be looked up": [["Cancel"], {}],
    "fields that are no map": ["Cancel", [1, 2]],
    "a number": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_message_is_refused(name):
    with pytest.raises(ValueError, match="message"):
        decode(msgpack.packb(WRONG[name]))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\xa6Can"])
def test_bytes_that_are_no_msgpack_are_refused(data):
    with pytest.raises(ValueError, match="message"):
        decode(data)


def test_structs_of_the_step_have_no_padding():
    assert (STEP.size, DONE.size) == (8 + 7 * 4, 8 + 2 * 4 + 2 * 8)
    assert READ.itemsize == 40
    row = np.array([(2**60, 2**63, 2**31 - 1, 59, 511, Priority.PREFETCH, 7, 0)], READ)
    again = row.view(np.uint8).view(READ)[0]
    assert again.tolist() == (2**60, 2**63, 2**31 - 1, 59, 511, 1, 7, 0)


def test_demand_is_before_prefetch():
    assert Priority.DEMAND < Priority.PREFETCH
