"""The sleep/wake protocol of layout.h, explored in all interleavings."""

import pytest
from channel_model import Consumer, Producer, Watcher, explore, shared_state


def check(producers, messages, slots, fault=None):
    programs = [Consumer(producers, messages, fault)]
    programs += [Producer(r, messages, slots, fault) for r in range(producers)]
    return explore(programs, shared_state(producers))


@pytest.mark.parametrize(
    ("producers", "messages", "slots"), [(1, 4, 1), (1, 4, 2), (1, 3, 8), (2, 2, 1), (2, 2, 2)]
)
def test_no_interleaving_loses_a_wakeup(producers, messages, slots):
    states, stuck = check(producers, messages, slots)
    assert stuck is None
    assert states > 100 * producers


@pytest.mark.parametrize(
    ("fault", "slots"),
    [
        ("ringer_clears", 8),
        ("look_first", 8),
        ("ring_first", 8),
        ("scan_first", 8),
        ("look_before_consume", 1),
        ("space_not_bumped", 1),
    ],
)
def test_the_checker_finds_what_is_wrong_with_other_protocols(fault, slots):
    _, stuck = check(1, 3, slots, fault)
    assert stuck is not None
    assert any(thread[2] is not None for thread in stuck[1])  # somebody sleeps for ever


@pytest.mark.parametrize("victim", [0, 1])
def test_nobody_sleeps_through_a_death(victim):
    messages, slots = 3, 1
    programs = [Consumer(1, messages), Producer(0, messages, slots), Watcher(1, messages)]
    states, stuck = explore(programs, shared_state(1), killable={victim})
    assert stuck is None
    assert states > 500


def test_without_the_watcher_a_death_is_slept_through():
    _, stuck = explore([Consumer(1, 2), Producer(0, 2, 1)], shared_state(1), killable={1})
    assert stuck is not None
