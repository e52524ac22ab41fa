"""Direct reads of experts: right bytes, real faults, injected faults."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from expert_files import (
    ALL,
    EXPERTS,
    LAYERS,
    Model,
    failing,
    open_descriptors,
    read_all,
    write_model,
)

from fomoe.errors import StorageError
from fomoe.gguf.extents import tensor_name
from fomoe.gguf.reader import open_gguf
from fomoe.storage import pieces as pieces_module
from fomoe.storage.reader import DirectReader
from fomoe.storage.segment import Segment


@pytest.mark.parametrize("direct", [True, False])
def test_every_expert(model: Model, segment: Segment, direct: bool) -> None:
    with DirectReader(model.file.shards, model.table, direct=direct) as reader:
        assert reader.table is model.table
        assert len(reader.direct) == 2
        assert direct or not any(reader.direct)
        read_all(reader, model, segment)
        assert reader.retries == 0


def test_the_last_expert_ends_inside_a_page(model: Model) -> None:
    # otherwise the test above says nothing about the end of a file
    last = model.table.extents(LAYERS - 1, EXPERTS - 1)[-1]
    assert last.offset + last.nbytes == model.file.shard_bytes[last.shard]
    assert model.file.shard_bytes[last.shard] % 4096


def test_a_memoryview_will_do(model: Model, segment: Segment) -> None:
    with DirectReader(model.file.shards, model.table) as reader:
        reader.read_expert(0, 3, memoryview(segment.view))
    assert model.in_slot(0, 3, segment.view)


def test_neighbouring_slots_stay_as_they_are(model: Model, segment: Segment) -> None:
    size = model.table.slot_bytes(0)
    segment.view[: 3 * size] = 0xAB
    with DirectReader(model.file.shards, model.table) as reader:
        reader.read_expert(0, 1, segment.view[size : 2 * size])
    assert (segment.view[:size] == 0xAB).all()
    assert (segment.view[2 * size : 3 * size] == 0xAB).all()


def test_a_slot_that_is_too_small(model: Model, segment: Segment) -> None:
    size = model.table.slot_bytes(0)
    with (
        DirectReader(model.file.shards, model.table) as reader,
        pytest.raises(ValueError, match=f"{size} are needed"),
    ):
        reader.read_expert(0, 0, segment.view[: size - 1])


def test_threads_share_a_reader(model: Model, segment: Segment) -> None:
    size = model.slot_bytes
    wrong: list[tuple[int, int]] = []

    def work(number: int) -> None:
        slot = segment.view[number * size : (number + 1) * size]
        for layer, expert in random.Random(number).sample(ALL, len(ALL)):
            reader.read_expert(layer, expert, slot)
            if not model.in_slot(layer, expert, slot):
                wrong.append((layer, expert))

    with DirectReader(model.file.shards, model.table) as reader:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not wrong


# Real faults.


def victim(model: Model, layer: int, expert: int, part: int = 0) -> Path:
    return model.file.shards[model.table.extents(layer, expert)[part].shard]


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_truncated_under_us(model: Model, segment: Segment, direct: bool) -> None:
    with DirectReader(model.file.shards, model.table, direct=direct) as reader:
        gone = model.table.extents(2, 4)[1]
        path = model.file.shards[gone.shard]
        expected = model.parts(2, 3)
        os.truncate(path, gone.offset + 100)
        with pytest.raises(StorageError) as caught:
            reader.read_expert(2, 4, segment.view)
        message = str(caught.value)
        assert str(path) in message
        assert tensor_name(2, "up") in message
        assert "expert 4" in message
        assert f"has {gone.offset + 100:,} now" in message
        assert "bytes early" in message
        # what lies before the cut is still there
        reader.read_expert(0, 0, segment.view)
        assert len(expected) == 3


def test_a_file_cut_inside_a_page(model: Model, segment: Segment) -> None:
    with DirectReader(model.file.shards, model.table) as reader:
        last = model.table.extents(LAYERS - 1, EXPERTS - 1)[-1]
        os.truncate(model.file.shards[last.shard], last.offset + last.nbytes - 1)
        with pytest.raises(StorageError, match=r"restore the file"):
            reader.read_expert(LAYERS - 1, EXPERTS - 1, segment.view)


def test_a_deleted_file_is_still_read(model: Model, segment: Segment) -> None:
    expected = model.parts(0, 0)
    with DirectReader(model.file.shards, model.table) as reader:
        victim(model, 0, 0).unlink()
        reader.read_expert(0, 0, segment.view)
        offset = model.table.part_offsets(0, 0)[0]
        assert segment.view[offset : offset + len(expected[0])].tobytes() == expected[0]


def copy_over(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").rename(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "gone from its place": Path.unlink,
    "another file has taken its place": copy_over,
    "was written to": lambda path: os.utime(path, ns=(0, 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_failed_read_says_what_became_of_the_file(
    model: Model, segment: Segment, change: str
) -> None:
    with DirectReader(model.file.shards, model.table, pread=failing(errno.EBADF)) as reader:
        CHANGES[change](victim(model, 0, 0))
        with pytest.raises(StorageError, match=rf"{change}.*restore the file"):
            reader.read_expert(0, 0, segment.view)


@pytest.mark.parametrize("most_bytes", [4096, 8192, 1 << 20])
def test_pieces_make_up_the_expert(
    model: Model, segment: Segment, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    for small in (0, 4096, 1 << 20):
        monkeypatch.setattr(pieces_module, "SMALL_BYTES", small)
        with DirectReader(model.file.shards, model.table) as reader:
            for layer, expert in ALL:
                slot = segment.view[: model.table.slot_bytes(layer)]
                slot[:] = 0xEE
                pieces = reader.pieces(layer, expert, most_bytes)
                spans = [span for piece in pieces for span in piece]
                assert sum(span.nbytes for span in spans) == model.table.expert_bytes(layer)
                assert all(sum(s.nbytes for s in piece) <= most_bytes for piece in pieces)
                ends = {(s.part.name, s.offset + s.nbytes) for s in spans}
                assert all(
                    (s.part.name, s.offset) in ends for s in spans if s.at > s.part.area
                )  # fmt: skip
                for piece in random.Random(layer).sample(pieces, len(pieces)):
                    reader.read_piece(piece, expert, slot.data)
                assert model.in_slot(layer, expert, slot)


def test_a_missing_file(model: Model) -> None:
    victim(model, 0, 0).unlink()
    with pytest.raises(StorageError, match=r"cannot be opened.*readable file of [\d,]+ bytes"):
        DirectReader(model.file.shards, model.table)


def test_a_file_of_another_size(model: Model) -> None:
    path = model.file.shards[1]
    os.truncate(path, path.stat().st_size + 1)
    before = open_descriptors()
    with pytest.raises(StorageError, match="instead of"):
        DirectReader(model.file.shards, model.table)
    assert open_descriptors() == before


def test_a_directory_and_a_wrong_number_of_files(model: Model, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a regular file"):
        DirectReader([tmp_path, model.file.shards[1]], model.table)
    with pytest.raises(StorageError, match="1 files given, the model has 2"):
        DirectReader(model.file.shards[:1], model.table)


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(each) for each in command], check=True, timeout=60, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def loop_mount(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 image mounted through a loop device: (image, mount point)."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4") or not shutil.which("losetup"):
        pytest.skip("needs root, losetup and mkfs.ext4")
    image, point = tmp_path / "image", tmp_path / "mount"
    image.touch()
    os.truncate(image, 64 << 20)
    point.mkdir()
    try:
        run("mkfs.ext4", "-q", "-O", "^has_journal", image)
        device = run("losetup", "--find", "--show", image)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device: {error.stderr}")
    try:
        run("mount", device, point)
        yield image, point
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no mount: {error.stderr}")
    finally:
        subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)
        subprocess.run(["losetup", "-d", device], check=False, capture_output=True)


def test_a_drive_that_fails(loop_mount: tuple[Path, Path], segment: Segment) -> None:
    image, point = loop_mount
    model = write_model(point)
    run("sync", "-f", point)
    waits: list[float] = []
    with DirectReader(model.file.shards, model.table, sleep=waits.append) as reader:
        assert all(reader.direct)
        read_all(reader, model, segment)
        # the data blocks lie behind the first megabyte, whose inodes are in memory already
        os.truncate(image, 1 << 20)
        with pytest.raises(StorageError, match=r"Input/output error, 4 tries.*smartctl") as caught:
            reader.read_expert(1, 5, segment.view)
        assert tensor_name(1, "gate") in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert len(waits) == 3


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that refuses O_DIRECT."""
    point = tmp_path / "ramfs"
    point.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root")
    try:
        run("mount", "-t", "ramfs", "ramfs", point)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no ramfs: {error.stderr}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)


def test_a_file_system_without_direct_reads(ramfs: Path, segment: Segment) -> None:
    model = write_model(ramfs)
    with DirectReader(model.file.shards, model.table) as reader:
        assert reader.direct == (False, False)
        read_all(reader, model, segment)


def test_shared_memory_file_system(segment: Segment) -> None:
    folder = Path("/dev/shm") / f"fomoe-test-{os.getpid()}"
    folder.mkdir()
    try:
        model = write_model(folder)
        with DirectReader(model.file.shards, model.table) as reader:
            read_all(reader, model, segment)
    finally:
        shutil.rmtree(folder)


def test_the_table_travels(model: Model, segment: Segment) -> None:
    table = type(model.table).from_dict(model.table.to_dict())
    shards = open_gguf(model.file.path).shards
    with DirectReader(shards, table) as reader:
        read_all(reader, model, segment)
