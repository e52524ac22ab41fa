"""What a fetch queue works on: fetches, the jobs made of them, and what is counted of both."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fomoe.errors import StorageError
from fomoe.storage.pieces import Piece

DEMAND = 0
PREFETCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """One expert to bring into one slot.

    Attributes:
        slot: the slot's number in its pool; carried for the receiver.
        address: byte offset of the slot in the segment; slots never overlap in part.
        generation: the value that tells this content of the slot from the one before.
        layer: the expert's layer.
        expert: the expert's number in the layer.
        priority: DEMAND (0) or PREFETCH (1).
        source_address: byte offset of the slot to copy from, or -1 to read the file.
        keep: a prefetch that goes on when those of its layer are forgotten.
    """

    slot: int
    address: int
    generation: int
    layer: int
    expert: int
    priority: int = DEMAND
    source_address: int = -1
    keep: bool = False


def same_read(one: Fetch, other: Fetch) -> bool:
    """Whether two fetches read the same content into the same slot, whatever their priority."""
    return (
        one.source_address < 0
        and other.source_address < 0
        and (one.address, one.generation) == (other.address, other.generation)
        and (one.layer, one.expert) == (other.layer, other.expert)
    )


@dataclass(slots=True, eq=False)
class Job:
    """A fetch in the queue, read in pieces; a copy is one piece without spans.

    `blockers` counts the slots on which an earlier job comes first; `tried` is the fetch that the
    pieces handed out so far are read for; `reported` says that nobody can join any more because
    the landing is being announced.
    """

    fetch: Fetch
    order: int
    priority: int
    pieces: tuple[Piece, ...]
    blockers: int = 0
    tried: Fetch | None = None
    handed: int = 0
    running: int = 0
    nbytes: int = 0
    error: StorageError | None = None
    reported: bool = False
    dropped: bool = False

    @property
    def addresses(self) -> tuple[int, ...]:
        """The slots that the job writes and reads."""
        if self.fetch.source_address < 0:
            return (self.fetch.address,)
        return (self.fetch.address, self.fetch.source_address)

    @property
    def started(self) -> bool:
        """Whether a thread has begun with it."""
        return self.tried is not None

    @property
    def droppable(self) -> bool:
        """Whether the job has not begun and no demand read waits for it, or it were hurried."""
        return self.priority == PREFETCH and not self.started

    @property
    def has_pieces(self) -> bool:
        """Whether a piece is left to hand out."""
        return self.handed < len(self.pieces) and self.error is None

    @property
    def must_repeat(self) -> bool:
        """Whether a guess failed while a demand read joined it: that one is tried for itself."""
        return self.error is not None and self.fetch is not self.tried

    def hand_out(self) -> Piece:
        """Return the next piece."""
        self.tried = self.tried or self.fetch
        self.handed += 1
        self.running += 1
        return self.pieces[self.handed - 1]

    def take_back(self, nbytes: int, error: StorageError | None) -> bool:
        """Count a piece as read or failed; returns whether it was the last one under way."""
        self.running -= 1
        self.nbytes += nbytes
        self.error = self.error or error
        return self.running == 0 and not self.has_pieces

    def repeat(self) -> None:
        """Begin again."""
        self.tried, self.error = None, None
        self.handed = self.nbytes = 0


@dataclass(slots=True)
class FetchCounters:
    """What the queue has done since it was made; each list is indexed by priority.

    `nbytes` are true expert bytes by the priority that each piece was read at. `busy_s` is the sum
    over threads of time spent on jobs. `open_s` is the time in which a job of the priority was in
    the queue or under way, for prefetches without any demand beside them: what `nbytes` is to be
    divided by to compare it with what the drive can do. `met` counts the prefetches that a demand
    read met: not begun, begun, and done.
    """

    jobs: list[int] = field(default_factory=lambda: [0, 0])
    nbytes: list[int] = field(default_factory=lambda: [0, 0])
    busy_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    open_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    met: list[int] = field(default_factory=lambda: [0, 0, 0])
    failed: int = 0
    dropped: int = 0
    _open: list[int] = field(default_factory=lambda: [0, 0])
    _since: float = 0.0

    def opened(self, priority: int, change: int) -> None:
        """Count jobs of a priority that came (1) or went (-1)."""
        now = time.perf_counter()
        if self._open[DEMAND]:
            self.open_s[DEMAND] += now - self._since
        elif self._open[PREFETCH]:
            self.open_s[PREFETCH] += now - self._since
        self._since = now
        self._open[priority] += change
