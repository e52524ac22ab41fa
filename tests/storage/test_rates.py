"""The drive's rate: a number for a file that can be read directly, clear errors for others."""

import contextlib

import pytest

from fomoe.errors import StorageError
from fomoe.storage.rates import direct_read_rate


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
