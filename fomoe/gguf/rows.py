"""Rows of a tensor that stay in the file."""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from fomoe.errors import GGUFError
from fomoe.gguf.header import TensorInfo
from fomoe.gguf.quants import row_bytes


class StoredRows:
    """Reads single rows when they are wanted: of an embedding a token needs one.

    There are `rows` of them, `row_bytes` each, of type `qtype`. Not for threads to share.
    """

    def __init__(self, path: Path, info: TensorInfo, most: int) -> None:
        self.rows = math.prod(info.shape[:-1])
        self.qtype = int(info.type)
        self.row_bytes = row_bytes(info.type, info.shape[-1])
        self._path = path
        self._info = info
        self._buffer = np.empty((most, self.row_bytes), np.uint8)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise GGUFError(
                path, info.name, info.offset, f"cannot be opened: {error.strerror}", "check it"
            ) from error
        weakref.finalize(self, os.close, self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """Return the rows `ids` as uint8 [n, row_bytes], valid until the next call.

        Raises:
            IndexError: an id is not a row.
            GGUFError: the file cannot be read any more.
        """
        out = self._buffer[: len(ids)]
        for row, index in zip(out, ids.tolist(), strict=True):
            if not 0 <= index < self.rows:
                raise IndexError(f"row {index} of {self.rows:,} of {self._info.name}")
            offset = self._info.offset + index * self.row_bytes
            try:
                got = os.preadv(self._fd, [row.data], offset)
            except OSError as error:
                self._refuse(offset, str(error.strerror), error)
            if got != self.row_bytes:
                self._refuse(offset, f"only {got:,} of {self.row_bytes:,} bytes came", None)
        return out

    def _refuse(self, offset: int, problem: str, cause: OSError | None) -> NoReturn:
        hint = "restore the file and start again"
        raise GGUFError(self._path, self._info.name, offset, problem, hint) from cause
