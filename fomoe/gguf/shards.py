"""Finds all files of a model that is split into several, from the name of any one of them.

Naming and keys: `gguf-split` of llama.cpp. Files are called NAME-00001-of-0000N.gguf; each holds
`split.no` (from 0), `split.count` and `split.tensors.count` (the sum over all files).
"""

from __future__ import annotations

import re
from pathlib import Path

from fomoe.errors import GGUFError
from fomoe.gguf.header import Header

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MAX_SHARDS = 4096


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to, in order; just `path` when it is not split.

    Raises:
        GGUFError: a file of the set is missing; the message lists every missing one.
    """
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= MAX_SHARDS:
        raise GGUFError(
            path,
            "file name",
            0,
            f"file {number} of {count} (1 to {MAX_SHARDS} files are read)",
            "give the file its original name back",
        )
    names = [f"{match['stem']}-{each:05d}-of-{count:05d}.gguf" for each in range(1, count + 1)]
    paths = tuple(path.with_name(name) for name in names)
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        listed = ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")
        raise GGUFError(
            path,
            "file name",
            0,
            f"{len(missing)} of {count} files are missing: {listed}",
            f"put them beside it in {path.parent}",
        )
    return paths


def check_split(headers: tuple[Header, ...]) -> None:
    """Check that the files agree with each other about how the model is split.

    Raises:
        GGUFError: a file belongs to another split, is out of order, or tensors are missing.
    """
    for index, header in enumerate(headers):
        metadata = header.metadata
        count = metadata.int("split.count", hi=0xFFFF, default=0) or 1
        if count != len(headers):
            metadata.refuse(
                "split.count",
                f"the file is one of {count}, its name says one of {len(headers)}; give it its "
                "original name back",
            )
        if len(headers) == 1:
            continue
        number = metadata.int("split.no", hi=0xFFFF)
        if number != index:
            metadata.refuse(
                "split.no", f"the file is number {number + 1}, its name says {index + 1}"
            )
    first = headers[0].metadata
    have = sum(len(header.tensors) for header in headers)
    expected = first.int("split.tensors.count", default=have)
    if have != expected:
        first.refuse("split.tensors.count", f"{expected:,} tensors expected, {have:,} found")
