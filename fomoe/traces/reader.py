"""Reads a trace as arrays, mapped from its file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.errors import TraceError
from fomoe.traces.format import PROMPT, TraceFacts, read_header, record_crc, record_type
from fomoe.traces.records import Passage, Records, pack_records
from fomoe.traces.rows import RouterRows

_BLOCK_TOKENS = 256  # checked at a time


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRows:
    """One text of a trace: where its tokens are among the records, int64 [n], in order."""

    number: int
    label: str
    domain: str
    rows: npt.NDArray[np.int64]


class Trace:
    """Router rows of T tokens; views of the records, nothing is copied.

    Attributes:
        facts: the model.
        records: [T] of `record_type`.
        path: the file, or a name for what was made in memory.
        torn_bytes: bytes of an unfinished record at the end of the file, which are left out.
    """

    def __init__(
        self, facts: TraceFacts, records: Records, path: Path | None = None, torn_bytes: int = 0
    ) -> None:
        self.facts = facts
        self.records = records
        self.path = Path("(in memory)") if path is None else path
        self.torn_bytes = torn_bytes

    @classmethod
    def open(cls, path: Path | str) -> Trace:
        """Map a file; an unfinished record at its end is left out.

        Raises:
            TraceError: it cannot be read, is no trace, is of another version, or is damaged.
        """
        path = Path(path)
        facts, header_bytes = read_header(path)
        kind = record_type(facts)
        count, torn = divmod(path.stat().st_size - header_bytes, kind.itemsize)
        if count == 0:  # nothing can be mapped
            return cls(facts, np.zeros(0, kind), path, torn)
        records = np.memmap(path, kind, "r", header_bytes, (count,))
        return cls(facts, records.view(np.ndarray), path, torn)

    @classmethod
    def of(cls, facts: TraceFacts, passages: Iterable[tuple[Passage, RouterRows]]) -> Trace:
        """Return a trace in memory; each passage with its rows [L, T, C]."""
        parts = [pack_records(facts, passage, rows) for passage, rows in passages]
        return cls(facts, np.concatenate([np.zeros(0, record_type(facts)), *parts]))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def ids(self) -> npt.NDArray[np.uint16]:
        """The candidates, uint16 [T, L, C], best first; the first k are the exact router's."""
        ids: npt.NDArray[np.uint16] = self.records["ids"]
        return ids

    @property
    def probabilities(self) -> npt.NDArray[np.float16]:
        """Theirs, float16 [T, L, C]."""
        probabilities: npt.NDArray[np.float16] = self.records["probabilities"]
        return probabilities

    @property
    def tail(self) -> npt.NDArray[np.float32]:
        """What all other experts have together, float32 [T, L]."""
        tail: npt.NDArray[np.float32] = self.records["tail"]
        return tail

    @property
    def is_prompt(self) -> npt.NDArray[np.bool_]:
        """Whether a token went through in prefill, bool [T]."""
        flags: npt.NDArray[np.bool_] = (self.records["flags"] & PROMPT) != 0
        return flags

    def prompt_among(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return `is_prompt` of some records [n]; only these are looked at."""
        flags: npt.NDArray[np.bool_] = (self.records["flags"][rows] & PROMPT) != 0
        return flags

    @cached_property
    def sequences(self) -> tuple[SequenceRows, ...]:
        """The texts, by number; how their tokens were interleaved does not matter."""
        numbers = self.records["sequence"].astype(np.int64)
        names = self.records[["label", "domain"]]
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        found = []
        for rows in np.split(order, starts[1:]) if len(order) else ():
            label, domain = names[rows[0]].tolist()
            found.append(SequenceRows(int(numbers[rows[0]]), _text(label), _text(domain), rows))
        return tuple(found)

    def verify(self) -> None:
        """Check every record: its checksum, and that its rows can be what a router said.

        Raises:
            TraceError: names the first record that is wrong, and how many before it are good.
        """
        for start in range(0, len(self), _BLOCK_TOKENS):
            block = np.array(self.records[start : start + _BLOCK_TOKENS])
            good = _sound(block, self.facts.n_experts)
            good &= [
                int(block["crc"][i]) == record_crc(block[i : i + 1]) for i in range(len(block))
            ]
            if not good.all():
                bad = start + int(np.argmin(good))
                raise TraceError(
                    self.path, f"record {bad:,} of {len(self):,} is damaged",
                    f"the {bad:,} before it are good; record it again",
                )  # fmt: skip


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


def _sound(block: Records, n_experts: int) -> npt.NDArray[np.bool_]:
    """Say of each record whether its candidates are distinct experts with falling probabilities."""
    ids, p = block["ids"], block["probabilities"].astype(np.float32)
    ordered, tail = np.sort(ids, axis=2), block["tail"]
    with np.errstate(invalid="ignore"):
        # The router's exp is exact to an ulp, which rounding to float16 may turn into one of those.
        falling = p[..., 1:] <= p[..., :-1] * np.float32(1.002) + np.float32(1e-7)
        in_range = (p[..., 0] <= 1) & (p[..., -1] >= 0) & (tail >= 0) & (tail <= 1.001)
    distinct = ordered[..., 1:] > ordered[..., :-1]
    whole = [falling.all(axis=2), distinct.all(axis=2), (ids < n_experts).all(axis=2), in_range]
    sound: npt.NDArray[np.bool_] = np.logical_and.reduce(whole).all(axis=1)
    return sound
