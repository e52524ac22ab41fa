"""Files that lie: each must be refused at once, in little memory, with a message that helps."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    Q4_K,
    Q8_0,
    STRING,
    U8,
    U32,
    U64,
    File,
    array,
    pair,
    peak_bytes,
    reset_peak,
    strings,
    tensor,
    text,
)

from fomoe.errors import GGUFError
from fomoe.gguf.reader import open_gguf

HUGE = 2**64 - 1


def keyed(*pairs: bytes, **rest: object) -> bytes:
    return File(pairs=list(pairs), **rest).build()


def tabled(*tensors: bytes, **rest: object) -> bytes:
    return File(tensors=list(tensors), **rest).build()


def nested(depth: int) -> bytes:
    inner = b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(depth))
    return text("deep") + struct.pack("<I", ARRAY) + inner + struct.pack("<IQ", U8, 0)


# name -> (bytes, the field that the message must name)
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic"),
    "three bytes": (b"GGU", "magic"),
    "magic only": (b"GGUF", "version"),
    "not a gguf": (b"PK\x03\x04" + bytes(64), "magic"),
    "old ggml": (b"tjgg" + bytes(64), "magic"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "magic"),
    "html": (b"<!DOCTYPE html><html></html>", "magic"),
    "version 0": (File(version=0).build(), "version"),
    "version 1": (File(version=1).build(), "version"),
    "version 4": (File(version=4).build(), "version"),
    "big-endian": (File(version=3 << 24).build(), "version"),
    "ends in counts": (File().build()[:20], "count"),
    "tensor count 2^64-1": (File(n_tensors=HUGE).build(), "tensor count"),
    "tensor count 2^32-1": (File(n_tensors=2**32 - 1).build(), "tensor count"),
    "tensor count past the end": (File(n_tensors=1000).build(), "tensor count"),
    "tensor count one too many": (File(n_tensors=3).build(), "tensor 2"),
    "pair count 2^64-1": (File(n_pairs=HUGE).build(), "key-value count"),
    "pair count 2^32-1": (File(n_pairs=2**32 - 1).build(), "key-value count"),
    "pair count past the end": (File(n_pairs=1000).build(), "key-value count"),
    "pair count one too few": (File(n_pairs=1).build(), "qwen35moe.block_count"),
    "key length 2^64-1": (keyed(text("k", HUGE) + b"\0" * 20), "key of pair 0"),
    "key length 2^63": (keyed(text("k", 2**63) + b"\0" * 20), "key of pair 0"),
    "key of 70 KB": (keyed(pair("k" * 70_000, U8, 1)), "key of pair 0"),
    "empty key": (keyed(pair("", U8, 1)), "key of pair 0"),
    "key with a newline": (keyed(pair("a\nb", U8, 1)), "key of pair 0"),
    "key not UTF-8": (keyed(pair(b"\xff\xfe", U8, 1)), "key of pair 0"),
    "key twice": (keyed(pair("a", U8, 1), pair("a", U8, 2)), "a"),
    "value type 13": (keyed(text("a") + struct.pack("<I", 13) + bytes(16)), "a"),
    "value type 2^32-1": (keyed(text("a") + struct.pack("<I", 2**32 - 1) + bytes(16)), "a"),
    "value cut": (keyed(pair("a", U64, 1), tensors=[], data=b"")[:-20], "a"),
    "bool of 2": (keyed(pair("a", BOOL, 2)), "a"),
    "string length 2^64-1": (keyed(text("a") + struct.pack("<IQ", STRING, HUGE)), "a"),
    "string length 2^40": (keyed(text("a") + struct.pack("<IQ", STRING, 2**40)), "a"),
    "string past the end": (keyed(text("a") + struct.pack("<IQ", STRING, 10_000)), "a"),
    "string not UTF-8": (keyed(pair("a", STRING, b"\xc3\x28")), "a"),
    "array length 2^64-1": (keyed(array("a", U32, b"", HUGE)), "a"),
    "array length 2^63": (keyed(array("a", U32, b"", 2**63)), "a"),
    "array length 2^62 of 4": (keyed(array("a", U32, b"", 2**62)), "a"),
    "array length 2^40": (keyed(array("a", U8, b"", 2**40)), "a"),
    "array past the end": (keyed(array("a", F32, b"", 1000)), "a"),
    "array of unknown": (keyed(array("a", 77, b"", 1)), "a"),
    "array of bool 9": (keyed(array("a", BOOL, b"\1\0\x09", 3)), "a"),
    "array of arrays": (keyed(nested(1)), "deep"),
    "arrays 100k deep": (keyed(nested(100_000)), "deep"),
    "strings count 2^64-1": (keyed(array("a", STRING, b"", HUGE)), "a"),
    "strings count 2^40": (keyed(array("a", STRING, b"", 2**40)), "a"),
    "strings one too many": (
        keyed(array("a", STRING, text("x"), 2), tensors=[], data=b""),
        "a",
    ),
    "token length 2^64-1": (keyed(array("a", STRING, text("x", HUGE), 1)), "a"),
    "token length 2^63-8": (keyed(array("a", STRING, text("x", 2**63 - 8), 1)), "a"),
    "token length past the end": (keyed(array("a", STRING, text("x", 5000), 1)), "a"),
    "alignment 0": (keyed(pair("general.alignment", U32, 0)), "general.alignment"),
    "alignment 3": (keyed(pair("general.alignment", U32, 3)), "general.alignment"),
    "alignment 48": (keyed(pair("general.alignment", U32, 48)), "general.alignment"),
    "alignment 2^31": (keyed(pair("general.alignment", U32, 2**31)), "general.alignment"),
    "alignment 2 MiB": (keyed(pair("general.alignment", U32, 2 << 20)), "general.alignment"),
    "alignment negative": (keyed(pair("general.alignment", I32, -32)), "general.alignment"),
    "alignment a string": (keyed(pair("general.alignment", STRING, "32")), "general.alignment"),
    "alignment an array": (keyed(array("general.alignment", U32, bytes(4), 1)), "alignment"),
    "tensor name empty": (tabled(tensor("")), "name of tensor 0"),
    "tensor name of 64": (tabled(tensor("n" * 64)), "name of tensor 0"),
    "tensor name of 1 MB": (tabled(tensor("n" * 1_000_000)), "name of tensor 0"),
    "tensor name 2^64-1": (tabled(text("n", HUGE) + bytes(40)), "name of tensor 0"),
    "tensor name not UTF-8": (tabled(tensor(b"\x80abc")), "name of tensor 0"),
    "tensor name with NUL": (tabled(tensor("a\0b")), "name of tensor 0"),
    "tensor name with escape": (tabled(tensor("\x1b[2J")), "name of tensor 0"),
    "tensor twice": (tabled(tensor("a"), tensor("a", offset=256)), "a"),
    "0 dimensions": (tabled(tensor("a", dims=())), "a (dimensions)"),
    "5 dimensions": (tabled(tensor("a", dims=(32, 1, 1, 1, 1))), "a (dimensions)"),
    "2^32-1 dimensions": (tabled(tensor("a", n_dims=2**32 - 1)), "a (dimensions)"),
    "dimension 0": (tabled(tensor("a", dims=(32, 0))), "a (dimensions)"),
    "first dimension 0": (tabled(tensor("a", dims=(0, 2))), "a (dimensions)"),
    "dimension 2^64-1": (tabled(tensor("a", dims=(HUGE,))), "a (dimensions)"),
    "product wraps to 0": (tabled(tensor("a", dims=(2**32, 2**32))), "a (dimensions)"),
    "product wraps to 64": (
        tabled(tensor("a", dims=(2**33 + 32, 2**31, 2**33, 2**31))),
        "a (dimensions)",
    ),
    "bytes wrap": (tabled(tensor("a", dims=(2**62,))), "a (offset)"),
    "tensor type 4": (tabled(tensor("a", kind=4)), "a (type)"),
    "tensor type 2^32-1": (tabled(tensor("a", kind=2**32 - 1)), "a (type)"),
    "tensor type IQ2_XXS": (tabled(tensor("a", dims=(256, 2), kind=16)), "a (type)"),
    "row of 31 in Q8_0": (tabled(tensor("a", dims=(31, 2), kind=Q8_0)), "a (dimensions)"),
    "row of 128 in Q4_K": (tabled(tensor("a", dims=(128, 2), kind=Q4_K)), "a (dimensions)"),
    "offset 2^64-32": (tabled(tensor("a", offset=2**64 - 32)), "a (offset)"),
    "first offset 32": (tabled(tensor("a", offset=32)), "a (offset)"),
    "offset unaligned": (tabled(tensor("a"), tensor("b", offset=257)), "b (offset)"),
    "tensors overlap": (tabled(tensor("a"), tensor("b", offset=128)), "b (offset)"),
    "tensors share bytes": (tabled(tensor("a"), tensor("b")), "b (offset)"),
    "gap between tensors": (tabled(tensor("a"), tensor("b", offset=288)), "b (offset)"),
    "data cut by a byte": (File().build()[:-1], "b.weight (offset)"),
    "data missing": (File(data=b"").build(), "a.weight (offset)"),
    "table cut": (File().header()[:-4], "b.weight (offset)"),
    "exabyte tensor": (tabled(tensor("a", dims=(2**40, 2**18))), "a (offset)"),
    "split count without shards": (keyed(pair("split.count", U32, 3)), "split.count"),
}


@pytest.mark.parametrize(("content", "field"), CASES.values(), ids=CASES.keys())
def test_malformed_file_is_refused(tmp_path: Path, content: bytes, field: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(GGUFError) as caught:
            open_gguf(path)
        seconds = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    error = caught.value
    assert seconds < 1.0
    assert peak < 8 << 20
    assert field in error.field
    assert 0 <= error.offset <= len(content)
    assert str(path) in str(error)
    assert "; " in str(error).split(f"{error.offset:,}: ", 1)[1], "no hint of what to do"


SPARSE = {
    "string of 2^38": text("a") + struct.pack("<IQ", STRING, 2**38),
    "numbers of 2^38": array("a", U8, b"", 2**38),
    "2^30 strings": array("a", STRING, b"", 2**30),
    "2^20 empty strings": array("a", STRING, b"", 2**20),
    "string of 48 MB": text("a") + struct.pack("<IQ", STRING, 48 << 20),
}


@pytest.mark.parametrize("lie", SPARSE.values(), ids=SPARSE.keys())
def test_a_terabyte_of_holes_does_not_back_up_a_lie(tmp_path: Path, lie: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(File(pairs=[lie], n_pairs=2, tensors=[], data=b"").build())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    reset_peak()
    before = peak_bytes()
    began = time.process_time()
    with pytest.raises(GGUFError):
        open_gguf(path)
    assert time.process_time() - began < 1.0
    assert peak_bytes() - before < 200 << 20


def test_invalid_token_text_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(keyed(strings("tokens", ["ok", b"\xff", "ok"])))
    metadata = open_gguf(path).metadata
    with pytest.raises(GGUFError, match="element 1 is not valid UTF-8"):
        metadata.strings("tokens")


@pytest.mark.parametrize("make", ["directory", "missing", "fifo", "nul"])
def test_what_is_not_a_file_is_refused(tmp_path: Path, make: str) -> None:
    import os

    path = tmp_path / "model.gguf"
    if make == "directory":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "nul":
        path = Path("model\0.gguf")
    with pytest.raises(GGUFError, match=r"not a regular file|cannot be opened"):
        open_gguf(path)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40
