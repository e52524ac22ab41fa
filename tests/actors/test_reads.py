"""The driver's accounts of what storage has dropped, whatever has become of the slots meanwhile."""

from types import SimpleNamespace

import numpy as np
import pytest

from fomoe.actors.messages import DROPPED, Priority, Tag
from fomoe.actors.reads import Reads
from fomoe.engine.ahead import AheadArrays, Governor
from fomoe.engine.meter import HostCounters
from fomoe.engine.transfers import READ
from fomoe.types import Tier

LAYER, EXPERT, SLOT, GENERATION, NBYTES = 1, 5, 3, 7, 1000


@pytest.fixture
def said():
    """What storage says next: messages."""
    return []


@pytest.fixture
def reads(said):
    def try_recv(buffer):
        if not said:
            return None
        message = said.pop(0)
        buffer[: len(message)] = message
        return Tag.DROPPED, len(message)

    node = SimpleNamespace(
        name="storage-0", receiver=SimpleNamespace(try_recv=try_recv),
        sender=SimpleNamespace(send=lambda *message: None),
        slots=SimpleNamespace(n_slots=8, is_current=lambda *expert: False),
    )  # fmt: skip
    arrays = SimpleNamespace(
        unproven=np.full((2, 8), Tier.DEVICE, np.int8), background=np.zeros((2, 8), np.bool_),
        layer_node=np.zeros(2, np.int32), layer_device=np.zeros(2, np.int32),
        expert_bytes=np.full(2, NBYTES),
    )  # fmt: skip
    governor = Governor(AheadArrays(2, 8, 0.5), depth=1, expert_bytes=NBYTES)
    fabric = SimpleNamespace(spec=SimpleNamespace(slot_bytes=4096))
    counters = HostCounters(nvme_bytes=NBYTES, prefetch_bytes=NBYTES)
    made = Reads(fabric, [node], SimpleNamespace(arrays=arrays), governor, counters)
    governor.arrays.charged[LAYER, EXPERT] = True
    return made


def ask(reads, priority):
    row = np.zeros(1, READ)
    row["slot"], row["generation"], row["priority"] = SLOT, GENERATION, priority
    reads._send(reads.node_of(LAYER), row)


def test_a_guess_that_was_never_read_is_paid_back(reads, said):
    ask(reads, Priority.PREFETCH)
    said.append(DROPPED.pack(LAYER, EXPERT, SLOT, GENERATION))
    reads.settle()
    assert (reads._counters.nvme_bytes, reads._counters.prefetch_bytes) == (0, 0)
    assert reads._counters.prefetched_dropped == 1


def test_one_that_was_demanded_behind_it_has_been_read(reads, said):
    """Although its slot may be another's by the time that the driver hears of it."""
    ask(reads, Priority.PREFETCH)
    ask(reads, Priority.DEMAND)
    said.append(DROPPED.pack(LAYER, EXPERT, SLOT, GENERATION))
    reads.settle()
    assert (reads._counters.nvme_bytes, reads._counters.prefetch_bytes) == (NBYTES, NBYTES)


def test_the_slot_s_next_read_is_another(reads, said):
    ask(reads, Priority.DEMAND)
    said.append(DROPPED.pack(LAYER, EXPERT, SLOT, GENERATION + 1))
    reads.settle()
    assert reads._counters.nvme_bytes == 0


def test_a_guess_that_a_prompt_evicts_unread_is_paid_back_to_its_own_cause(reads, said):
    ask(reads, Priority.PREFETCH)
    reads.evict(LAYER, EXPERT)
    said.append(DROPPED.pack(LAYER, EXPERT, SLOT, GENERATION))
    reads.settle()
    counters = reads._counters
    assert (counters.nvme_bytes, counters.prefetch_bytes, counters.prompt_bytes) == (0, 0, 0)


def test_one_that_a_prompt_reads_ahead_again_is_the_prompt_s(reads, said):
    reads._counters.prompt_bytes = NBYTES
    reads.guess(LAYER, EXPERT)
    said.append(DROPPED.pack(LAYER, EXPERT, SLOT, GENERATION))
    reads.settle()
    assert (reads._counters.prefetch_bytes, reads._counters.prompt_bytes) == (NBYTES, 0)
