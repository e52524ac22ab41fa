"""Appends router rows to a trace file, token by token."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from fomoe.errors import TraceError
from fomoe.traces.format import TraceFacts, pack_header, read_header, record_type
from fomoe.traces.records import Passage, pack_records
from fomoe.traces.rows import RouterRows

_BLOCK_TOKENS = 64  # written at a time: 1 MB of records of 60 layers


class TraceWriter:
    """Writes a trace; continues a file of the same model where one is there.

    Each token is one record that is whole or at the end of the file; nothing is held back.
    """

    def __init__(self, path: Path | str, facts: TraceFacts) -> None:
        """Open or create the file and keep others from writing to it.

        Raises:
            TraceError: it cannot be written, is open in another writer, is no trace, or is of
                another model.
        """
        self.path = Path(path)
        self.facts = facts
        self._type = record_type(facts)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._refused(error) from None
        try:
            self._sequence = self._prepare()
        except BaseException:
            os.close(self._file)
            raise

    def _refused(self, error: OSError) -> TraceError:
        return TraceError(
            self.path, f"cannot be written ({error.strerror})", "name another file, or make room"
        )

    def _prepare(self) -> int:
        """Go to the end of the last whole record; return the next sequence's number."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(self._file).st_size
            if size == 0:
                self._write(pack_header(self.facts))
                return 0
        except OSError as error:
            raise self._refused(error) from None
        facts, header_bytes = read_header(self.path)
        if facts != self.facts:
            raise TraceError(
                self.path, f"is a trace of {facts}, not of {self.facts}", "name another file"
            )
        held = (size - header_bytes) // self._type.itemsize
        end = header_bytes + held * self._type.itemsize
        try:
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
            if held == 0:
                return 0
            records = np.memmap(self.path, self._type, "r", header_bytes, (held,))
        except OSError as error:
            raise self._refused(error) from None
        return int(records["sequence"].max()) + 1

    def new_sequence(self) -> int:
        """Return the number of a text that begins."""
        number = self._sequence
        self._sequence += 1
        return number

    def append(self, passage: Passage, rows: RouterRows) -> None:
        """Write the records of a passage.

        Args:
            passage: T tokens of a text.
            rows: theirs, [L, T, C].

        Raises:
            TraceError: the file cannot be written to (the disk is full, ...); it ends with a whole
                record and can be written to again.
            ValueError: the rows have another shape than the passage and the model.
        """
        count = len(passage.tokens)
        shape = (self.facts.n_layers, count, self.facts.candidates)
        if rows.ids.shape != shape:
            raise ValueError(f"rows of shape {rows.ids.shape}, must be {shape}")
        for start in range(0, count, _BLOCK_TOKENS):
            stop = min(start + _BLOCK_TOKENS, count)
            records = pack_records(self.facts, passage.part(start, stop), rows.part(start, stop))
            end = os.lseek(self._file, 0, os.SEEK_CUR)
            try:
                self._write(records.view(np.uint8).data)
            except OSError as error:
                self._take_back(end)
                raise self._refused(error) from None

    def _take_back(self, end: int) -> None:
        """Drop what a failed write has left, so that no later record lies behind half a one."""
        with suppress(OSError):
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._file, left) :]

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
