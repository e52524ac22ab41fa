"""Copies of two devices on one link: guesses wait for steps, and nothing is copied twice."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.streams import OFFSETS, PART, Streams

from fomoe.actors.expert_copies import ExpertCopies, Source
from fomoe.actors.shared_link import WORDS, SharedLink, announce
from fomoe.engine.copies import COPY, CopyKind, Outcome

SLOTS, EXPERTS = 4, 8


class Device:
    """Copies over streams that move when told to, from slots that have landed or not."""

    def __init__(self, link=None):
        self.memory = np.zeros(1024 * (SLOTS + EXPERTS), np.uint8)
        self.landed = np.ones(EXPERTS, np.uint64)
        self.streams = Streams()
        table = SimpleNamespace(
            n_layers=1, stride=np.full((1, 3), PART),
            part_offset_array=lambda layer: np.tile(np.array(OFFSETS), (EXPERTS, 1)),
        )  # fmt: skip
        source = Source(self.landed, self.memory.ctypes.data + 1024 * SLOTS)
        self.copies = ExpertCopies(self.streams, self, source, table, link)

    def class_of(self, layer):
        return 0

    def layout(self, layer):
        return SimpleNamespace(offsets=OFFSETS)

    def slot_address(self, size_class, slot):
        return self.memory.ctypes.data + 1024 * slot

    def set(self, layer, expert, slot):
        pass

    def load(self, expert, vram, step=0):
        row = (1024 * expert, 1, 0, 24, CopyKind.LOAD, 0, expert, vram, expert, Outcome.OPEN)
        self.copies.order(np.array([row], COPY), step)
        self.copies.advance()

    def run(self):
        while actions := self.streams.actions():
            actions[0]()
        self.copies.advance()


@pytest.fixture
def pair():
    words = np.zeros((2, WORDS), np.uint64)
    links = SharedLink(words[0], [words[1]]), SharedLink(words[1], [words[0]])
    return words, Device(links[0]), Device(links[1])


def test_a_guess_waits_for_an_announced_step_and_its_loads(pair):
    words, first, second = pair
    announce(words[0], 5)
    second.load(1, 0)
    assert second.copies.nbytes == 0
    assert second.copies.under_way
    first.load(2, 0, step=5)
    second.copies.advance()
    assert second.copies.nbytes == 0
    first.run()
    second.copies.advance()
    assert second.copies.nbytes == 3 * PART


def test_a_step_waits_for_nobody(pair):
    words, _, second = pair
    announce(words[0], 5)
    second.load(1, 0, step=6)
    assert second.copies.nbytes == 3 * PART


def test_a_step_that_waits_for_storage_leaves_the_link(pair):
    words, first, second = pair
    announce(words[0], 5)
    first.landed[2] = 0
    first.load(2, 0, step=5)
    second.load(1, 0)
    assert second.copies.nbytes == 3 * PART


def test_a_step_given_up_leaves_the_link(pair):
    words, first, second = pair
    announce(words[0], 5)
    first.load(2, 0, step=5)
    first.copies.abort(5)
    first.run()
    second.load(1, 0)
    assert second.copies.nbytes == 3 * PART


def test_guesses_begin_one_at_a_time_and_nobody_sleeps_before_all_have():
    device = Device()
    rows = [(1024 * e, 1, 0, 24, CopyKind.LOAD, 0, e, e, e, Outcome.OPEN) for e in range(3)]
    device.copies.order(np.array(rows, COPY))
    assert device.copies.nbytes == 0
    for begun in (1, 2, 2):
        assert device.copies.under_way
        device.copies.advance()
        assert device.copies.nbytes == begun * 3 * PART
    device.run()
    assert device.copies.nbytes == 3 * 3 * PART


def test_what_lies_there_is_not_copied_again():
    device = Device()
    device.load(1, 0)
    device.run()
    assert len(device.copies.ended) == 1
    device.load(1, 0, step=1)
    assert device.copies.has_begun(1)
    assert device.copies.has_ended(1)
    assert device.copies.nbytes == 3 * PART


def test_what_was_overwritten_or_moved_is_copied_again():
    device = Device()
    for expert, vram in ((1, 0), (2, 0), (1, 0), (1, 1), (1, 0)):
        device.load(expert, vram, step=1)
        device.run()
    assert device.copies.nbytes == 5 * 3 * PART
