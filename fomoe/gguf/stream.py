"""A forward reader of a file's header that never allocates what the file cannot back up."""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path
from typing import NoReturn

from fomoe.errors import GGUFError

# A header of a 248k-token vocabulary with its merges is 10 MB; nothing known comes near this.
MAX_HEADER_BYTES = 64 << 20
MAX_STRINGS = 1 << 20  # in one array; the largest vocabularies have half a million merges
_CHUNK_BYTES = 1 << 20

_U8 = struct.Struct("<B")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_TRUNCATED = "the file is cut short or damaged, download it again"


class HeaderStream:
    """Reads the front of a file in order, in chunks, checking every length before it is used.

    Args:
        fd: an open file descriptor; the stream does not close it.
        path: the file's name, for messages.
        size: the file's size in bytes.
    """

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.offset = 0
        self._fd = fd
        self._limit = min(size, MAX_HEADER_BYTES)
        self._buffer = bytearray()

    def fail(self, field: str, problem: str, hint: str, at: int | None = None) -> NoReturn:
        """Raise a GGUFError for `field` at byte `at` (where the stream stands when not given)."""
        raise GGUFError(self.path, field, self.offset if at is None else at, problem, hint)

    def need(self, nbytes: int, field: str) -> None:
        """Make `nbytes` from here readable, or refuse the file."""
        end = self.offset + nbytes
        if end > self._limit:
            self._refuse_length(nbytes, field)
        while len(self._buffer) < end:
            at = len(self._buffer)
            wanted = min(_CHUNK_BYTES, self._limit - at)
            try:
                chunk = os.pread(self._fd, wanted, at)
            except OSError as error:
                self.fail(field, f"cannot be read: {error.strerror}", "check the drive", at)
            if not chunk:
                self.fail(field, f"the file ends at byte {at:,} of {self.size:,}", _TRUNCATED)
            self._buffer += chunk

    def need_items(self, count: int, item_bytes: int, field: str) -> None:
        """Refuse a count of items that could not fit even at `item_bytes` (the least) each."""
        left = self._limit - self.offset
        if count * item_bytes > left:
            self.fail(
                field,
                f"{count:,} entries of at least {item_bytes} bytes do not fit in the {left:,} "
                "bytes left",
                _TRUNCATED,
            )

    def _refuse_length(self, nbytes: int, field: str) -> NoReturn:
        left = self.size - self.offset
        if nbytes > left:
            self.fail(field, f"{nbytes:,} bytes wanted, {left:,} bytes left", _TRUNCATED)
        self.fail(
            field,
            f"{nbytes:,} bytes wanted, the header would pass {MAX_HEADER_BYTES:,} bytes",
            "no known model has such a header, so the file is damaged: download it again",
        )

    def take(self, nbytes: int, field: str) -> bytes:
        """The next `nbytes` as they are."""
        self.need(nbytes, field)
        start = self.offset
        self.offset += nbytes
        return bytes(self._buffer[start : self.offset])

    def u8(self, field: str) -> int:
        """The next unsigned byte."""
        return self._scalar(_U8, field)

    def u32(self, field: str) -> int:
        """The next little-endian unsigned 32-bit number."""
        return self._scalar(_U32, field)

    def u64(self, field: str) -> int:
        """The next little-endian unsigned 64-bit number."""
        return self._scalar(_U64, field)

    def _scalar(self, form: struct.Struct, field: str) -> int:
        self.need(form.size, field)
        value: int = form.unpack_from(self._buffer, self.offset)[0]
        self.offset += form.size
        return value

    def text(self, field: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        """The next string (u64 length, then UTF-8), at most `max_bytes` long."""
        at = self.offset
        nbytes = self.u64(field)
        if nbytes > max_bytes:
            self.fail(
                field,
                f"{nbytes:,} bytes long, at most {max_bytes:,} are allowed",
                "the file is damaged or not a GGUF, download it again",
                at,
            )
        raw = self.take(nbytes, field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(
                field,
                f"not valid UTF-8: {error.reason} in byte {error.start}",
                "the file is damaged or was written wrongly, download or convert it again",
                at,
            )

    def text_array(self, count: int, field: str) -> tuple[bytes, array[int]]:
        """The next `count` strings, undecoded.

        Returns:
            The strings' bytes with their length prefixes, and the offset in them at which each
            string's bytes end (its first byte lies 8 after the end of the one before).
        """
        self.need_items(count, _U64.size, field)
        if count > MAX_STRINGS:
            self.fail(field, f"at most {MAX_STRINGS:,} strings are read", _TRUNCATED)
        start = position = self.offset
        ends = array("q")
        unpack, have = _U64.unpack_from, len(self._buffer)
        for _ in range(count):
            if position + 8 > have:
                self.offset = position
                self.need(8, field)
                have = len(self._buffer)
            after = position + 8 + unpack(self._buffer, position)[0]
            if after > have:
                self.offset = position + 8
                self.need(after - self.offset, field)
                have = len(self._buffer)
            position = after
            ends.append(position - start)
        self.offset = position
        with memoryview(self._buffer) as view:
            return bytes(view[start:position]), ends
