"""The watcher by itself: recycled pids, kernels without pidfd, peers that come late."""

import errno
import os
import subprocess
import time

import pytest

from fomoe.actors.channel._channel import ABSENT, ALIVE
from fomoe.actors.channel.peers import PeerWatcher, starttime


class Table:
    """A process table that tests write."""

    def __init__(self):
        self.rows = {0: (ABSENT, 0, 0), 1: (ABSENT, 0, 0)}

    def describe(self, row):
        return self.rows[row]


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watch():
    watchers = []

    def start(table, rows=(0, 1)):
        dead = []
        watchers.append(PeerWatcher(table, rows, dead.append))
        watchers[-1].start()
        return dead

    yield start
    for watcher in watchers:
        watcher.stop()


def wait_for(dead, rows, seconds=3):
    deadline = time.monotonic() + seconds
    while dead != rows and time.monotonic() < deadline:
        time.sleep(0.002)
    assert dead == rows


def test_a_recycled_pid_is_not_the_peer(watch, sleeper):
    table = Table()
    started = starttime(sleeper.pid)
    table.rows = {0: (ALIVE, sleeper.pid, started - 1), 1: (ALIVE, sleeper.pid, started)}
    dead = watch(table)
    assert dead == [0]
    sleeper.kill()
    wait_for(dead, [0, 1])


def test_a_peer_that_is_gone_already_is_reported_at_once(watch):
    table = Table()
    process = subprocess.Popen(["true"])
    process.wait()
    table.rows[1] = (ALIVE, process.pid, 1)
    assert watch(table) == [1]


def test_a_late_peer_is_found_and_watched(watch, sleeper):
    table = Table()
    dead = watch(table)
    time.sleep(0.05)
    table.rows[1] = (ALIVE, sleeper.pid, starttime(sleeper.pid))
    time.sleep(0.1)
    assert dead == []
    sleeper.kill()
    wait_for(dead, [1])


def test_without_pidfd_the_table_of_processes_is_asked(watch, sleeper, monkeypatch):
    def refuse(pid):
        raise PermissionError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    table = Table()
    table.rows[0] = (ALIVE, sleeper.pid, starttime(sleeper.pid))
    dead = watch(table)
    time.sleep(0.1)
    assert dead == []
    sleeper.kill()
    wait_for(dead, [0])


def test_a_zombie_counts_as_gone(sleeper):
    assert starttime(sleeper.pid) > 0
    sleeper.kill()
    deadline = time.monotonic() + 3
    while starttime(sleeper.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert sleeper.returncode is None  # not waited for: it is a zombie
    assert starttime(sleeper.pid) is None
    assert starttime(2**22 + 1) is None


def test_a_watcher_with_nobody_left_to_find_sleeps(watch, sleeper):
    table = Table()
    table.rows = {row: (ALIVE, sleeper.pid, starttime(sleeper.pid)) for row in (0, 1)}
    asked = []
    dead = watch(table)
    table.describe = asked.append
    time.sleep(0.1)
    assert asked == dead == []
