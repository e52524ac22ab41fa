"""Random damage to a valid file: it opens or it is refused, nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_bytes import F32, Q8_0, STRING, U8, U32, U64, File, array, pair, strings, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe.errors import GGUFError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile, open_gguf

PART_BYTES = 3 * 32 * 34  # 3 experts of 32 rows of one Q8_0 block


def valid_file() -> bytes:
    tensors = []
    for index, part in enumerate(("gate", "up", "down")):
        name = f"blk.0.ffn_{part}_exps.weight"
        tensors.append(tensor(name, (32, 32, 3), Q8_0, index * PART_BYTES))
    return File(
        pairs=[
            pair("general.architecture", STRING, "qwen35moe"),
            pair("general.alignment", U32, 32),
            pair("split.count", U32, 1),
            pair("rope", F32, 1.5),
            strings("tokens", ["a", "b", "ü"]),
            array("types", U8, b"\1\2\3", 3),
            pair("big", U64, 2**63),
        ],
        tensors=tensors,
        data=bytes(3 * PART_BYTES),
    ).build()


VALID = valid_file()


def exercise(file: GGUFFile) -> None:
    """Call everything that a damaged but accepted file can reach."""
    metadata = file.metadata
    getters = (metadata.int, metadata.float, metadata.bool, metadata.str)
    for key in metadata:
        for getter in (*getters, metadata.strings, metadata.ints, metadata.floats):
            with contextlib.suppress(GGUFError):
                getter(key)
    for name in file.tensors:
        file.read(name)
    with contextlib.suppress(GGUFError):
        ExpertTable.from_gguf(file)


@pytest.fixture
def path() -> Iterator[Path]:
    """A file in memory, for a disk would make thousands of rewrites slow."""
    fd = os.memfd_create("model.gguf")
    yield Path(f"/proc/self/fd/{fd}")
    os.close(fd)


def opened(path: Path) -> GGUFFile | GGUFError:
    try:
        return open_gguf(path)
    except GGUFError as error:
        return error


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    outcome = opened(path)
    if isinstance(outcome, GGUFFile):
        exercise(outcome)
    else:
        assert 0 <= outcome.offset <= len(content)


fuzzing = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# the table and the metadata are the interesting part
POSITION = st.integers(0, len(VALID) - 1) | st.integers(0, len(VALID) - 1 - 3 * PART_BYTES)


def test_the_undamaged_file_opens(path: Path) -> None:
    path.write_bytes(VALID)
    file = open_gguf(path)
    assert ExpertTable.from_gguf(file).n_experts == 3
    exercise(file)


@fuzzing
@given(flips=st.lists(st.tuples(POSITION, st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for position, mask in flips:
        content[position] ^= mask
    check(path, bytes(content))


@fuzzing
@given(position=POSITION, word=st.integers(0, 2**64 - 1) | st.sampled_from([2**63, 2**32, 2**31]))
def test_overwritten_words(path: Path, position: int, word: int) -> None:
    content = bytearray(VALID)
    content[position : position + 8] = word.to_bytes(8, "little")
    check(path, bytes(content))


def test_every_truncation_is_refused(path: Path) -> None:
    # the last tensor ends with the file, so no shorter file is whole
    for end in range(0, len(VALID), 37):
        path.write_bytes(VALID[:end])
        with pytest.raises(GGUFError):
            open_gguf(path)


@fuzzing
@given(data=st.data())
def test_cut_and_pasted_pieces(path: Path, data: st.DataObject) -> None:
    start, end, to = (data.draw(POSITION) for _ in range(3))
    piece = VALID[min(start, end) : max(start, end)][:200]
    check(path, VALID[:to] + piece + VALID[to:])
