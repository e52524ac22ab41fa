"""The shared segment: sharing, sealing, death of its creator, no leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from expert_files import open_descriptors

from fomoe.errors import BudgetError, StorageError
from fomoe.storage.segment import Segment, SegmentHandle, available_bytes

PAGE = 4096
CREATE = """
import json, sys
from fomoe.storage.segment import Segment
segment = Segment.create(8 * 4096)
segment.view[:5] = bytearray(b"hello")
print(json.dumps(segment.handle()), flush=True)
sys.stdin.read()
"""
ATTACH = """
import json, sys
from fomoe.storage.segment import Segment
with Segment.attach(json.loads(sys.argv[1])) as segment:
    assert segment.view[:5].tobytes() == b"hello"
    segment.view[-1] = 77
"""
LIMITED = """
import resource
from fomoe.storage.segment import Segment
from fomoe.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    Segment.create(4 << 20)
except StorageError as error:
    print(error)
"""


@contextmanager
def creator() -> Iterator[tuple[subprocess.Popen[str], SegmentHandle]]:
    """Another process that has made a segment, and its handle."""
    process = subprocess.Popen(
        [sys.executable, "-c", CREATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_create() -> None:
    with Segment.create(3 * PAGE - 1) as segment:
        assert segment.nbytes == 3 * PAGE
        assert segment.view.shape == (3 * PAGE,)
        assert segment.address % PAGE == 0
        assert segment.view.flags.writeable
        assert not segment.view.any()


def test_pages_are_allocated_at_once() -> None:
    with Segment.create(64 * PAGE) as segment:
        handle = segment.handle()
        assert os.fstat(handle["fd"]).st_blocks * 512 == 64 * PAGE


def test_two_mappings_share_their_bytes() -> None:
    with Segment.create(PAGE) as first, Segment.attach(first.handle()) as second:
        assert first.address != second.address
        first.view[17] = 5
        assert second.view[17] == 5
        second.view[18] = 6
        assert first.view[18] == 6


def test_another_process_attaches() -> None:
    with Segment.create(PAGE) as segment:
        segment.view[:5] = bytearray(b"hello")
        subprocess.run(
            [sys.executable, "-c", ATTACH, json.dumps(segment.handle())], check=True, timeout=60
        )
        assert segment.view[-1] == 77


def test_the_bytes_outlive_a_killed_creator() -> None:
    with creator() as (process, handle), Segment.attach(handle) as segment:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        assert segment.view[:5].tobytes() == b"hello"
        segment.view[:5] = bytearray(b"still")
        with pytest.raises(StorageError, match="has died"):
            Segment.attach(handle)
        with Segment.attach(segment.handle()) as again:
            assert again.view[:5].tobytes() == b"still"


@pytest.mark.parametrize("nbytes", [PAGE, 3 * PAGE])
def test_the_size_is_sealed(nbytes: int) -> None:
    with Segment.create(2 * PAGE) as segment, pytest.raises(PermissionError):
        os.ftruncate(segment.handle()["fd"], nbytes)


def test_more_than_the_machine_has_is_refused_with_numbers() -> None:
    wanted = available_bytes() * 2
    with pytest.raises(BudgetError) as caught:
        Segment.create(wanted)
    assert caught.value.needed_bytes >= wanted
    assert 0 < caught.value.given_bytes < wanted


def test_a_refused_allocation_is_a_clear_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], check=True, timeout=60, capture_output=True, text=True
    )
    assert "4,194,304 bytes of shared memory" in done.stdout
    assert "smaller RAM budget" in done.stdout


def machine(root: Path, cgroup: str, groups: dict[str, dict[str, str]]) -> Path:
    """A fake /proc and /sys of a machine with 1,000,000 KiB available."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  1000000 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, files in groups.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name).write_text(content)
    return root


LIMIT = {"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 1\n"}
CACHED = {**LIMIT, "memory.stat": "anon 1\ninactive_file 300\nactive_file 200\nfile 999\n"}
OLD = {"memory.limit_in_bytes": "7000", "memory.usage_in_bytes": "4000"}


@pytest.mark.parametrize(
    ("cgroup", "groups", "available"),
    [
        ("", {}, 1_024_000_000),
        ("0::/\n", {"": {"memory.stat": ""}}, 1_024_000_000),
        ("0::/a/b\n", {"a/b": {**LIMIT, "memory.max": "max"}}, 1_024_000_000),
        ("0::/a/b\n", {"a/b": LIMIT}, 1000),
        ("0::/a/b\n", {"a": LIMIT}, 1000),
        ("0::/a/b\n", {"a/b": CACHED}, 1500),
        ("0::/a\n", {"a": {**LIMIT, "memory.current": "6000"}}, 0),
        ("0::/host/only\n", {"": LIMIT}, 1000),
        ("4:memory:/x\n1:cpu:/y\n0::/\n", {"memory/x": OLD}, 3000),
    ],
)
def test_available_memory(
    tmp_path: Path, cgroup: str, groups: dict[str, dict[str, str]], available: int
) -> None:
    assert available_bytes(machine(tmp_path, cgroup, groups)) == available


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_bytes(nbytes: int) -> None:
    with pytest.raises(ValueError, match="a segment of"):
        Segment.create(nbytes)


def test_attach_refuses_a_descriptor_that_means_another_file(tmp_path: Path) -> None:
    with Segment.create(PAGE) as segment:
        handle = segment.handle()
        other = tmp_path / "other"
        other.write_bytes(bytes(PAGE))
        fd = os.open(other, os.O_RDWR)
        try:
            with pytest.raises(StorageError, match="another file"):
                Segment.attach({**handle, "fd": fd})
            status = os.fstat(fd)
            with pytest.raises(StorageError, match=r"cannot be mapped|not sealed"):
                Segment.attach({**handle, "fd": fd, "inode": status.st_ino})
        finally:
            os.close(fd)
        with pytest.raises(StorageError, match="another file"):
            Segment.attach({**handle, "nbytes": 2 * PAGE})


def test_attach_refuses_an_unsealed_segment() -> None:
    fd = os.memfd_create("loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        inode = os.fstat(fd).st_ino
        with pytest.raises(StorageError, match="not sealed"):
            Segment.attach({"pid": os.getpid(), "fd": fd, "nbytes": PAGE, "inode": inode})
    finally:
        os.close(fd)


def mapped_segments() -> int:
    return Path("/proc/self/maps").read_text().count("fomoe-slots")


def test_nothing_is_left_behind() -> None:
    before, mapped = open_descriptors(), mapped_segments()
    for _ in range(20):
        with Segment.create(PAGE) as first:
            Segment.attach(first.handle()).close()
    with creator() as (process, handle):
        Segment.attach(handle).close()
        os.kill(process.pid, signal.SIGKILL)
    assert mapped_segments() == mapped
    assert open_descriptors() == before
    assert not list(Path("/dev/shm").glob("*fomoe-slots*"))


def test_close_twice_and_slices_outlive_it() -> None:
    segment = Segment.create(PAGE)
    piece = segment.view[:10]
    piece[:] = 9
    segment.close()
    segment.close()
    assert piece.tolist() == [9] * 10
    with pytest.raises(ValueError, match="closed"):
        segment.handle()
