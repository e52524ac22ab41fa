"""Opens a GGUF model, in one file or several, and reads its tensors by name."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from fomoe.errors import GGUFError
from fomoe.gguf.header import Header, TensorInfo, read_header
from fomoe.gguf.metadata import Metadata
from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.gguf.rows import StoredRows
from fomoe.gguf.shards import check_split, shard_paths

__all__ = ["GGUFFile", "TensorInfo", "open_gguf"]

_READ_BYTES = 64 << 20  # of a read, after which the page cache is told to forget it


class GGUFFile:
    """A parsed model: metadata, tensor table, and reads of single tensors.

    Nothing stays open between reads and nothing is mapped, so a file that changes meanwhile gives
    an error instead of a bus error.

    Attributes:
        path: the file that was asked for.
        shards: all files of the model in order; `TensorInfo.shard` counts in here.
        shard_bytes: their sizes.
        metadata: the key-value pairs of the first file.
        tensors: all tensors by name, in file order.
    """

    def __init__(self, path: Path, headers: tuple[Header, ...]) -> None:
        self.path = path
        self.shards = tuple(header.path for header in headers)
        self.shard_bytes = tuple(header.size for header in headers)
        self.metadata: Metadata = headers[0].metadata
        self.tensors: Mapping[str, TensorInfo] = _merge(headers)

    def tensor(self, name: str) -> TensorInfo:
        """The entry of tensor `name`.

        Raises:
            GGUFError: the model has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(
                self.path,
                name,
                0,
                "the tensor is missing",
                "the model is incomplete or of a kind that is not supported",
            )
        return info

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The blocks of tensor `name` as uint8 [rows, row_bytes]; rows = all dims but the last."""
        info = self.tensor(name)
        width = row_bytes(info.type, info.shape[-1])
        out = np.empty((math.prod(info.shape[:-1]), width), np.uint8)
        self._read_into(info, out.reshape(-1).data)
        return out

    def read_f32(self, name: str) -> npt.NDArray[np.float32]:
        """Tensor `name` (F32, F16 or BF16) as float32 of the tensor's shape."""
        info = self.tensor(name)
        raw = self.read(name).reshape(-1)
        if info.type is GGMLType.F32:
            values = raw.view("<f4").astype(np.float32, copy=False)
        elif info.type is GGMLType.F16:
            values = raw.view("<f2").astype(np.float32)
        elif info.type is GGMLType.BF16:
            # a bfloat16 is the upper half of a float32
            values = (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            raise GGUFError(
                self.shards[info.shard],
                name,
                info.offset,
                f"the tensor is {info.type.name}, F32, F16 or BF16 was expected",
                "use a quantisation that leaves this tensor in floating point",
            )
        return values.reshape(info.shape)

    def rows(self, name: str, most: int) -> StoredRows:
        """Tensor `name` row by row, at most `most` at a time; only what is asked for is read."""
        info = self.tensor(name)
        return StoredRows(self.shards[info.shard], info, most)

    def _read_into(self, info: TensorInfo, out: memoryview) -> None:
        path = self.shards[info.shard]
        done = 0
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < info.nbytes:
                    piece = out[done : done + _READ_BYTES]
                    got = os.preadv(fd, [piece], info.offset + done)
                    if got == 0:
                        break
                    # A second copy of what is in memory now would count against a control group.
                    os.posix_fadvise(fd, info.offset + done, got, os.POSIX_FADV_DONTNEED)
                    done += got
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
        except OSError as error:
            raise GGUFError(
                path, info.name, info.offset + done, f"{error.strerror}", "check file and drive"
            ) from error
        if size != self.shard_bytes[info.shard] or done < info.nbytes:
            raise GGUFError(
                path,
                info.name,
                info.offset + done,
                f"the file had {self.shard_bytes[info.shard]:,} bytes when it was opened and has "
                f"{size:,} now",
                "restore the file and start again",
            )


def open_gguf(path: Path | str) -> GGUFFile:
    """Open the model that `path` is, or is one file of.

    Raises:
        GGUFError: a file is missing, malformed, truncated or not supported.
    """
    path = Path(path)
    headers: list[Header] = []
    for shard, each in enumerate(shard_paths(path)):
        try:
            # O_NONBLOCK: a named pipe in place of the file must not hang the open
            fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise GGUFError(
                each, "file", 0, f"cannot be opened: {error}", "check the path"
            ) from error
        try:
            headers.append(read_header(fd, each, shard))
        finally:
            os.close(fd)
    check_split(tuple(headers))
    return GGUFFile(path, tuple(headers))


def _merge(headers: tuple[Header, ...]) -> Mapping[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for info in header.tensors:
            if info.name in tensors:
                raise GGUFError(
                    header.path,
                    info.name,
                    info.offset,
                    f"the tensor is also in {headers[tensors[info.name].shard].path.name}",
                    "the files are of different splits, download them again",
                )
            tensors[info.name] = info
    return MappingProxyType(tensors)
