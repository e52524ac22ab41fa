"""Reads of valid files: agreement with the `gguf` package, getters, and big headers."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_bytes import (
    F32,
    I32,
    I64,
    STRING,
    U32,
    U64,
    File,
    array,
    pair,
    peak_bytes,
    reset_peak,
    strings,
    text,
)
from support.tiny_gguf import write_tiny

from fomoe.errors import GGUFError
from fomoe.gguf.metadata import Metadata
from fomoe.gguf.quants import UNSUPPORTED_TYPES, GGMLType, row_bytes
from fomoe.gguf.reader import open_gguf


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for qtype in GGMLType:
        twin = GGMLQuantizationType[qtype.name]
        assert int(twin) == int(qtype)
        assert GGML_QUANT_SIZES[twin] == (qtype.block_elements, qtype.block_bytes)


def test_unsupported_types_are_named_as_in_the_gguf_package() -> None:
    for number, name in UNSUPPORTED_TYPES.items():
        assert name in GGMLQuantizationType.__members__ or number > 30
        if name in GGMLQuantizationType.__members__:
            assert int(GGMLQuantizationType[name]) == number


@pytest.mark.parametrize(("qtype", "n", "nbytes"), [("Q4_K", 512, 288), ("F16", 3, 6)])
def test_row_bytes(qtype: str, n: int, nbytes: int) -> None:
    assert row_bytes(GGMLType[qtype], n) == nbytes


@pytest.mark.parametrize("n", [1, 255, -256])
def test_row_bytes_refuses_partial_blocks(n: int) -> None:
    with pytest.raises(ValueError, match="Q6_K blocks of 256"):
        row_bytes(GGMLType.Q6_K, n)


def write_all_types(path: Path, alignment: int) -> dict[str, np.ndarray]:
    """A file with every type, written by the gguf package; returns the raw bytes per tensor."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "qwen35moe")
    writer.add_custom_alignment(alignment)
    writer.add_block_count(3)
    writer.add_rope_freq_base(1e7)
    writer.add_bool("flag", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "", "<|im_end|>"])
    writer.add_array("counts", [1, 2, 3])
    writer.add_array("weights", [0.5, -1.25])
    raw: dict[str, np.ndarray] = {}
    for index, qtype in enumerate(GGMLType):
        shape = [(512,), (5, 256), (3, 2, 512), (2, 3, 1, 256)][index % 4]
        width = row_bytes(qtype, shape[-1])
        data = rng.integers(0, 256, (*shape[:-1], width), dtype=np.uint8)
        name = f"t.{qtype.name}.weight"
        raw[name] = data.reshape(-1, width)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[qtype.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_agrees_with_the_gguf_package(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    raw = write_all_types(path, alignment)
    file = open_gguf(path)
    twin = gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in twin.tensors] == list(raw)
    for tensor in twin.tensors:
        info = file.tensors[tensor.name]
        assert int(info.type) == int(tensor.tensor_type)
        assert info.offset == tensor.data_offset
        assert info.nbytes == tensor.n_bytes
        assert info.shape == tuple(int(dim) for dim in reversed(tensor.shape))
        np.testing.assert_array_equal(file.read(tensor.name), raw[tensor.name])
    assert set(file.metadata) == set(twin.fields) - {
        "GGUF.version",
        "GGUF.tensor_count",
        "GGUF.kv_count",
    }
    assert file.metadata.str("general.architecture") == "qwen35moe"
    assert file.metadata.int("qwen35moe.block_count", lo=1, hi=1024) == 3
    assert file.metadata.float("qwen35moe.rope.freq_base") == 1e7
    assert file.metadata.bool("flag") is True
    assert file.metadata.strings("tokenizer.ggml.tokens") == ["a", "é", "", "<|im_end|>"]
    assert file.metadata.ints("counts").tolist() == [1, 2, 3]
    assert file.metadata.floats("weights").tolist() == [0.5, -1.25]


def test_quantised_values_come_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    values = np.random.default_rng(3).standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "qwen35moe")
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor("w", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = gguf.quants.dequantize(open_gguf(path).read("w"), kind)
    # half a step of a block whose largest value is below 4
    np.testing.assert_allclose(back, values, atol=4 / 127 / 2)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_read_f32(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    values = np.array([[0.0, -1.5, 3.0], [2.0**-10, 65504.0, -0.25]], np.float32)
    stored = gguf.quants.quantize(values, GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(path, "qwen35moe")
    writer.add_tensor("w", stored, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = open_gguf(path).read_f32("w")
    assert got.dtype == np.float32
    # bfloat16 keeps 8 bits: half a unit in the last place is 2^-9
    np.testing.assert_allclose(got, values, rtol=2.0**-9 if kind == "BF16" else 0)


def test_read_f32_refuses_blocks(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_all_types(path, 32)
    with pytest.raises(GGUFError, match="the tensor is Q4_K"):
        open_gguf(path).read_f32("t.Q4_K.weight")


def test_unknown_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(File().build())
    with pytest.raises(GGUFError, match=r"c\.weight.*missing"):
        open_gguf(path).read("c.weight")


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path: Path, version: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(File(version=version).build())
    assert open_gguf(path).read("b.weight").tobytes() == bytes(range(256))


@pytest.mark.parametrize("change", ["truncate", "remove", "grow"])
def test_a_file_that_changes_under_us_is_an_error_not_a_crash(tmp_path: Path, change: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(File().build())
    file = open_gguf(path)
    if change == "truncate":
        os.truncate(path, path.stat().st_size - 300)
    elif change == "grow":
        os.truncate(path, path.stat().st_size + 1)
    else:
        path.unlink()
    with pytest.raises(GGUFError, match=r"b\.weight"):
        file.read("b.weight")


METADATA = File(
    pairs=[
        pair("int", U32, 7),
        pair("minus", I32, -7),
        pair("wide", U64, 2**64 - 1),
        pair("float", F32, 0.5),
        pair("nan", F32, float("nan")),
        pair("text", STRING, "hello"),
        array("ints", I64, struct.pack("<2q", -1, 2**40), 2),
        array("wides", U64, struct.pack("<Q", 2**63), 1),
        array("nans", F32, struct.pack("<f", float("inf")), 1),
        strings("texts", []),
    ]
).build()


@pytest.fixture
def metadata(tmp_path: Path) -> Metadata:
    path = tmp_path / "model.gguf"
    path.write_bytes(METADATA)
    return open_gguf(path).metadata


def test_getters(metadata: Metadata) -> None:
    assert metadata.int("int") == 7
    assert metadata.int("minus", lo=-10) == -7
    assert metadata.int("wide", hi=2**64) == 2**64 - 1
    assert metadata.ints("ints").tolist() == [-1, 2**40]
    assert metadata.strings("texts") == []
    assert "int" in metadata
    assert "other" not in metadata
    assert len(metadata) == 10
    assert metadata.is_array("ints")
    assert not metadata.is_array("int")
    assert not metadata.is_array("other")


def test_defaults_are_for_missing_keys_only(metadata: Metadata) -> None:
    assert metadata.int("other", default=3) == 3
    assert metadata.int("int", default=3) == 7
    assert metadata.float("other", default=0.0) == 0.0
    assert metadata.bool("other", default=False) is False
    assert metadata.str("other", default="") == ""
    with pytest.raises(GGUFError, match="STRING, an integer"):
        metadata.int("text", default=3)


@pytest.mark.parametrize(
    ("getter", "key", "problem"),
    [
        ("int", "other", "missing"),
        ("str", "other", "missing"),
        ("ints", "other", "missing"),
        ("int", "minus", "outside 0 to"),
        ("int", "wide", "outside 0 to"),
        ("int", "float", "FLOAT32, an integer"),
        ("int", "ints", "array of INT64"),
        ("float", "int", "UINT32, a floating"),
        ("float", "nan", "not a finite"),
        ("bool", "int", "UINT32, a boolean"),
        ("str", "int", "UINT32, a string"),
        ("strings", "text", "STRING, an array"),
        ("strings", "ints", "array of INT64"),
        ("ints", "texts", "array of STRING"),
        ("ints", "wides", "does not fit"),
        ("floats", "ints", "array of INT64"),
        ("floats", "nans", "not finite"),
    ],
)
def test_getters_refuse(metadata: Metadata, getter: str, key: str, problem: str) -> None:
    with pytest.raises(GGUFError, match=problem) as caught:
        getattr(metadata, getter)(key)
    assert caught.value.field == key
    if key in metadata:
        assert METADATA[caught.value.offset - len(key) :].startswith(key.encode())


def test_header_of_a_large_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tokens = [f"Ġtoken{number}".encode() for number in range(248_320)]
    merges = [f"Ġto ken{number}".encode() for number in range(247_587)]
    content = File(
        pairs=[
            array("tokens", STRING, b"".join(map(text, tokens)), len(tokens)),
            array("merges", STRING, b"".join(map(text, merges)), len(merges)),
            array("types", I32, bytes(4 * len(tokens)), len(tokens)),
        ]
    ).build()
    path.write_bytes(content)
    del content
    reset_peak()
    before = peak_bytes()
    began = time.process_time()
    file = open_gguf(path)
    seconds = time.process_time() - began
    assert seconds < 1.5
    assert peak_bytes() - before < 200 << 20
    decoded = file.metadata.strings("tokens")
    assert len(decoded) == len(tokens)
    assert decoded[-1] == tokens[-1].decode()
    assert file.metadata.strings("merges")[100_000] == merges[100_000].decode()


def in_page_cache(path: Path, offset: int) -> bool:
    """Whether a byte of a file can be had without a read."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def test_what_was_read_leaves_the_page_cache(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", layers=2, experts=4)
    with path.open("rb") as written:
        os.fsync(written.fileno())
    file = open_gguf(path)
    name = max(file.tensors, key=lambda each: file.tensors[each].nbytes)
    middle = file.tensors[name].offset + file.tensors[name].nbytes // 2
    try:
        path.read_bytes()
        if not in_page_cache(path, middle):
            pytest.skip("this file system keeps nothing")
    except OSError:
        pytest.skip("this file system does not tell")
    file.read(name)
    assert not in_page_cache(path, middle)
