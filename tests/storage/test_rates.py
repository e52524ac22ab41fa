"""The drive's rate: a number for a file that can be read directly, clear errors for others."""

import contextlib
import os
import threading
import time

import pytest
from support.tiny_gguf import write_tiny

from fomoe.errors import StorageError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.storage import rates
from fomoe.storage.rates import direct_read_rate, expert_read_times
from fomoe.storage.reader import DirectReader


def test_a_rate_is_measured_and_bounded_by_time(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(24 << 20))
    # A file system without direct reads says so; nothing else may go wrong.
    with contextlib.suppress(StorageError):
        rate = direct_read_rate(path, seconds=0.2)
        assert 1e5 < rate < 1e12


def test_too_small_a_file_is_refused(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    with pytest.raises(StorageError, match="fewer than 4,194,304 bytes"):
        direct_read_rate(path)


def test_reads_of_experts_are_timed_through_the_queue(tmp_path):
    path = write_tiny(tmp_path / "m.gguf", seed=2, quant="Q4_K_M", layers=2, vocab=300)
    file = open_gguf(path)
    with DirectReader(file.shards, ExpertTable.from_gguf(file)) as reader:
        each, on_top = expert_read_times(reader, seconds=0.1)
    assert 0 < each < 1
    assert 0 <= on_top < 1


def test_a_failed_read_ends_the_timing(tmp_path):
    path = write_tiny(tmp_path / "m.gguf", seed=2, quant="Q4_K_M", layers=2, vocab=300)
    file = open_gguf(path)

    def broken(fd, buffer, offset):
        raise OSError(5, "made up")

    table = ExpertTable.from_gguf(file)
    with (
        DirectReader(file.shards, table, pread=broken, sleep=lambda _: None) as reader,
        pytest.raises(StorageError, match="made up"),
    ):
        expert_read_times(reader, seconds=0.05)


def test_a_read_that_takes_too_long_ends_the_timing_and_its_threads(tmp_path, monkeypatch):
    path = write_tiny(tmp_path / "m.gguf", seed=2, quant="Q4_K_M", layers=2, vocab=300)
    file, before = open_gguf(path), set(threading.enumerate())
    monkeypatch.setattr(rates, "_READ_BOUND_S", 0.05)

    def slow(fd, buffer, offset):
        time.sleep(0.3)
        return os.preadv(fd, [buffer], offset)

    with (
        DirectReader(file.shards, ExpertTable.from_gguf(file), pread=slow) as reader,
        pytest.raises(StorageError, match=r"longer than 0\.05 s"),
    ):
        expert_read_times(reader, seconds=0.05)
    assert set(threading.enumerate()) <= before
