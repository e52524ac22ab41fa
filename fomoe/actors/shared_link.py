"""What devices on one link to the host's memory tell each other about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import load_acquire_u64, store_release_u64

U64 = npt.NDArray[np.uint64]

ANNOUNCED, TAKEN, LOADS, WORDS = 0, 1, 2, 3


def announce(words: U64, step: int) -> None:
    """The driver is about to send a device a step that brings experts."""
    store_release_u64(words, ANNOUNCED, step)


class SharedLink:
    """Lets what is brought ahead for one device wait while a step of another one waits for bytes.

    Copies of several processes share a link evenly, whoever began first: a guess beside a load that
    a step waits for takes half of the link from it, and nothing is left to bring while the step
    computes. The driver announces a step before it sends the guesses of the next one, so that these
    do not win a race. A step that waits for storage leaves the link to others.

    Args:
        own: uint64 [3] of this device: the step that was announced last, the one that was taken
            last, how many loads of its steps are on the link.
        others: those of the devices beside it.
    """

    def __init__(self, own: U64, others: Sequence[U64] = ()) -> None:
        self._own = own
        self._others = tuple(others)

    @classmethod
    def unshared(cls) -> SharedLink:
        """Return the link of a device that has one of its own."""
        return cls(np.zeros(WORDS, np.uint64))

    def take(self, step: int) -> None:
        """Every load of a step that could begin is on the link."""
        if self._others:
            store_release_u64(self._own, TAKEN, step)

    def carry(self, loads: int) -> None:
        """So many loads of this device's steps are on the link."""
        if self._others:
            store_release_u64(self._own, LOADS, loads)

    @property
    def is_free(self) -> bool:
        """Whether no other device's step waits for the link."""
        return not any(
            load_acquire_u64(words, ANNOUNCED) > load_acquire_u64(words, TAKEN)
            or load_acquire_u64(words, LOADS)
            for words in self._others
        )
