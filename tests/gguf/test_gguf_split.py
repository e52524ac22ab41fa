"""Models in several files, opened from any one of them."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import STRING, U16, U32, File, pair, tensor

from fomoe.errors import GGUFError
from fomoe.gguf.reader import open_gguf


def shard(number: int, count: int, total: int, names: list[str]) -> bytes:
    """File `number` (from 0) with one 256-byte tensor per name, filled with its number."""
    pairs = [pair("split.no", U16, number), pair("split.count", U16, count)]
    if number == 0:
        pairs.append(pair("general.architecture", STRING, "qwen35moe"))
    tensors = [tensor(name, offset=256 * index) for index, name in enumerate(names)]
    data = struct.pack("B", number) * (256 * len(names))
    pairs.append(pair("split.tensors.count", U32, total))
    return File(pairs=pairs, tensors=tensors, data=data).build()


def name(number: int, count: int = 3) -> str:
    return f"model-{number:05d}-of-{count:05d}.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, names in enumerate([["a", "b"], ["c"], ["d", "e"]]):
        (tmp_path / name(number + 1)).write_bytes(shard(number, 3, 5, names))
    return tmp_path


@pytest.mark.parametrize("number", [1, 2, 3])
def test_opens_from_any_file(folder: Path, number: int) -> None:
    file = open_gguf(folder / name(number))
    assert [path.name for path in file.shards] == [name(1), name(2), name(3)]
    assert list(file.tensors) == ["a", "b", "c", "d", "e"]
    assert [info.shard for info in file.tensors.values()] == [0, 0, 1, 2, 2]
    assert file.metadata.str("general.architecture") == "qwen35moe"
    assert file.read("e").tobytes() == b"\2" * 256
    assert file.shard_bytes == tuple(path.stat().st_size for path in file.shards)


def test_missing_files_are_all_listed(folder: Path) -> None:
    (folder / name(1)).unlink()
    (folder / name(3)).unlink()
    with pytest.raises(GGUFError, match="2 of 3 files are missing") as caught:
        open_gguf(folder / name(2))
    assert name(1) in str(caught.value)
    assert name(3) in str(caught.value)
    assert name(2) not in str(caught.value).split("files are missing")[1]


def test_exchanged_files(folder: Path) -> None:
    (folder / name(1)).rename(folder / "x")
    (folder / name(2)).rename(folder / name(1))
    (folder / "x").rename(folder / name(2))
    with pytest.raises(GGUFError, match=r"split\.no.*number 2, its name says 1"):
        open_gguf(folder / name(1))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (shard(1, 4, 5, ["c"]), "one of 4, its name says one of 3"),
        (shard(1, 3, 5, ["a"]), "also in model-00001"),
        (shard(1, 3, 5, []), "5 tensors expected, 4 found"),
        (shard(1, 3, 5, ["c", "x"]), "5 tensors expected, 6 found"),
        (File(tensors=[tensor("c")]).build(), r"split\.count"),
        (shard(1, 3, 5, ["c"])[:-1], "download is not complete"),
    ],
)
def test_a_file_of_another_split(folder: Path, content: bytes, problem: str) -> None:
    (folder / name(2)).write_bytes(content)
    with pytest.raises(GGUFError, match=problem):
        open_gguf(folder / name(1))


@pytest.mark.parametrize("odd", [name(0), name(4), "model-00001-of-00000.gguf", name(1, 99999)])
def test_impossible_names(tmp_path: Path, odd: str) -> None:
    (tmp_path / odd).write_bytes(File().build())
    with pytest.raises(GGUFError, match="original name"):
        open_gguf(tmp_path / odd)


def test_renamed_first_file(folder: Path) -> None:
    (folder / name(1)).rename(folder / "mymodel.gguf")
    with pytest.raises(GGUFError, match="one of 3, its name says one of 1"):
        open_gguf(folder / "mymodel.gguf")


def test_files_split_by_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "qwen35moe", split_max_tensors=2)
    values = {f"t{number}": np.full((2, 32), number, np.float32) for number in range(5)}
    for key, value in values.items():
        writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) == 3
    file = open_gguf(paths[1])
    assert list(file.tensors) == list(values)
    for key, value in values.items():
        np.testing.assert_array_equal(file.read_f32(key), value)
