"""Direct reads under injected faults: what passes, what stays, what says what."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
from expert_files import Model, failing, read_all

from fomoe.errors import StorageError
from fomoe.storage import reader as reader_module
from fomoe.storage.reader import DirectReader, _pread
from fomoe.storage.segment import Segment


@pytest.mark.parametrize(
    "codes",
    [(errno.EIO,), (errno.EIO,) * 3, (errno.EINTR, errno.EAGAIN), (errno.ETIMEDOUT, errno.EIO)],
)
def test_errors_that_pass(model: Model, segment: Segment, codes: tuple[int, ...]) -> None:
    waits: list[float] = []
    with DirectReader(
        model.file.shards, model.table, pread=failing(*codes), sleep=waits.append
    ) as reader:
        read_all(reader, model, segment)
        assert reader.retries == len(codes)
    assert waits == [0.005, 0.02, 0.08][: len(codes)]


def test_an_error_that_stays(model: Model, segment: Segment) -> None:
    with DirectReader(
        model.file.shards, model.table, pread=failing(*[errno.EIO] * 9), sleep=lambda _: None
    ) as reader:
        extent = model.table.extents(0, 2)[0]
        with pytest.raises(StorageError, match="4 tries") as caught:
            reader.read_expert(0, 2, segment.view)
        assert f"byte {extent.offset - extent.offset % 4096:,}" in str(caught.value)


def test_an_error_that_no_repetition_helps(model: Model, segment: Segment) -> None:
    waits: list[float] = []
    with (
        DirectReader(
            model.file.shards, model.table, pread=failing(errno.EBADF), sleep=waits.append
        ) as reader,
        pytest.raises(StorageError, match="Bad file descriptor"),
    ):
        reader.read_expert(0, 2, segment.view)
    assert not waits


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("unit", [1, 512, 4096])
def test_short_reads(model: Model, segment: Segment, direct: bool, unit: int) -> None:
    rng = random.Random(unit)

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        assert not direct or offset % 4096 == 0
        length = min(len(buffer), rng.randrange(2, 24) * 512 // unit * unit)
        scratch = np.zeros(len(buffer) + 4096, np.uint8)
        start = -scratch.ctypes.data % 4096
        target = scratch[start : start + len(buffer)].data
        got = min(_pread(fd, target, offset), max(length, 4096))
        buffer[:got] = target[:got]
        # what a real short read leaves behind is not the file's bytes
        buffer[got:] = bytes(len(buffer) - got)
        return got

    with DirectReader(model.file.shards, model.table, direct=direct, pread=pread) as reader:
        read_all(reader, model, segment)


def test_reads_that_stay_short(model: Model, segment: Segment) -> None:
    with (
        DirectReader(
            model.file.shards, model.table, pread=lambda *_: 100, sleep=lambda _: None
        ) as reader,
        pytest.raises(StorageError, match=r"only 100 of [\d,]+ bytes came, 4 tries"),
    ):
        reader.read_expert(0, 0, segment.view)


def test_direct_reads_refused_on_open(
    model: Model,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(reader_module.os, "open", refuse)
    with DirectReader(model.file.shards, model.table) as reader:
        monkeypatch.undo()
        assert reader.direct == (False, False)
        read_all(reader, model, segment)
    assert "page cache is used" in caplog.text


def test_direct_reads_refused_on_read(
    model: Model, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    with DirectReader(model.file.shards, model.table, pread=failing(errno.EINVAL)) as reader:
        assert reader.direct == (True, True)
        read_all(reader, model, segment)
        assert reader.direct == (False, True)
    assert "direct read was refused" in caplog.text


def test_a_slot_off_the_page(model: Model, segment: Segment) -> None:
    with DirectReader(model.file.shards, model.table) as reader:
        if not all(reader.direct):
            pytest.skip("no direct reads here")
        with pytest.raises(ValueError, match="not aligned"):
            reader.read_expert(0, 0, segment.view[1:])
        assert all(reader.direct)
