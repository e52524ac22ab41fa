"""The fabric between real processes, and what happens when they are killed."""

import fcntl
import hashlib
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from channel_peer import receive

from fomoe.actors.channel import Fabric, FabricSpec
from fomoe.errors import BudgetError, ChannelError, PeerDeadError


@pytest.fixture
def fabric(pair):
    with Fabric.create(pair(), "a") as made:
        yield made


def test_echo_between_processes(fabric, spawn):
    peer = spawn("echo", handle=fabric.handle())
    assert peer.hear() == {"ready": fabric.fabric_id}
    assert fabric.attached("b")
    buffer = bytearray(16384)
    for tag in range(500):
        payload = bytes([tag % 256]) * (tag * 31 % 16385)
        fabric.sender("b").send(tag % 99, payload)
        assert receive(fabric, fabric.receiver("b"), buffer) == (tag % 99, len(payload))
        assert buffer[: len(payload)] == payload
    states = fabric.arena("states")
    states[100:200] = np.arange(100)
    fabric.sender("b").send(99, b"", (("states", 100, 100),))
    assert receive(fabric, fabric.receiver("b"), buffer) == (99, 0)
    assert states[5000:5100].tolist() == list(range(1, 101))


def test_sleepers_are_woken_not_timed_out(fabric, spawn):
    spawn("echo", handle=fabric.handle()).hear()
    buffer = bytearray(16384)
    start = time.monotonic()
    for _ in range(150):
        fabric.sender("b").send(1, b"x")
        receive(fabric, fabric.receiver("b"), buffer, 0)
    # Without the wake each of the 300 sleeps would last its slice of 100 ms.
    assert time.monotonic() - start < 7.5


def test_two_hundred_thousand_messages_keep_their_checksum(spawn):
    spec = FabricSpec(("a", "b"), (("b", "a"),), (), 512, 300)
    with Fabric.create(spec, "a") as fabric:
        peer = spawn("flood", handle=fabric.handle(), count=200_000, seed=3)
        digest, buffer = hashlib.blake2b(), bytearray(300)
        view, receiver = memoryview(buffer), fabric.receiver("b")
        for i in range(200_000):
            tag, nbytes = receive(fabric, receiver, buffer, 20 if i % 2000 < 1900 else 0)
            assert tag == i
            digest.update(view[:nbytes])
        assert peer.hear() == {"checksum": digest.hexdigest()}


def test_a_killed_peer_is_noticed_within_50_ms(pair, spawn):
    noticed = []
    for _ in range(3):
        with Fabric.create(pair(), "a") as fabric:
            peer = spawn("bystand", handle=fabric.handle(), me="b")
            peer.hear()
            receiver, buffer = fabric.receiver("b"), bytearray(16384)
            assert receiver.try_recv(buffer) is None
            start = time.monotonic()
            peer.kill()
            with pytest.raises(PeerDeadError, match="b has died"):
                receive(fabric, receiver, buffer)
            noticed.append(time.monotonic() - start)
            with pytest.raises(PeerDeadError):
                fabric.sender("b").try_send(0, b"")
    # The best of three: this measures the watcher, not what else the machine does.
    assert min(noticed) < 0.05, noticed


def test_a_killed_creator_leaves_its_memory_and_its_last_words(pair, spawn):
    creator = spawn("create", spec=pair().to_dict(), write=[4, 5, 6])
    handle = creator.hear()["handle"]
    with Fabric.attach(handle, "b") as fabric:
        creator.kill()
        deadline = time.monotonic() + 5
        while not fabric.peer_dead("a") and time.monotonic() < deadline:
            time.sleep(0.002)
        buffer = bytearray(16384)
        assert fabric.receiver("a").try_recv(buffer) == (7, 10)
        assert buffer[:10] == b"last words"
        with pytest.raises(PeerDeadError):
            fabric.receiver("a").try_recv(buffer)
        assert fabric.arena("states")[:3].tolist() == [4, 5, 6]
        fabric.arena("states")[:] = 1  # no SIGBUS
    creator.close()
    with pytest.raises(ChannelError, match=r"creator, pid .* is gone"):
        Fabric.attach(handle, "b")


def test_a_third_process_that_attached_last_is_watched_by_all(spawn):
    spec = FabricSpec(("a", "b", "c"), (("a", "b"), ("b", "a"), ("c", "a"), ("c", "b")))
    with Fabric.create(spec, "a") as fabric, Fabric.attach(fabric.handle(), "b") as second:
        time.sleep(0.05)
        late = spawn("bystand", handle=fabric.handle(), me="c")
        late.hear()
        late.kill()
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not fabric.peer_dead("c"):
            time.sleep(0.002)
        assert fabric.peer_dead("c")
        assert second.peer_dead("c")
        assert not fabric.peer_dead("b")


def test_a_closed_fabric_is_a_death_to_the_others(fabric):
    with Fabric.attach(fabric.handle(), "b") as other:
        other.sender("a").try_send(1, b"bye")
    buffer = bytearray(16)
    assert fabric.receiver("b").try_recv(bytearray(16384)) == (1, 3)
    with pytest.raises(PeerDeadError):
        fabric.receiver("b").try_recv(buffer)


def test_a_signal_handler_runs_during_a_sleep(fabric, spawn):
    seen = spawn("interrupted", handle=fabric.handle()).hear()
    assert seen["rung"] is False
    assert seen["handled_s"] < 0.25
    assert 0.3 <= seen["slept_s"] < 2  # the signal did not end the wait


def test_the_memory_is_sealed_and_has_no_name(fabric):
    fd = fabric.handle()["fd"]
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert seals & wanted == wanted
    with pytest.raises(OSError, match="permitted"):
        os.ftruncate(fd, 0)
    assert str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/memfd:")


def test_attach_checks_who_and_what(fabric, pair, spawn):
    handle = fabric.handle()
    with pytest.raises(ChannelError, match=r"'a' .* was taken by pid"):
        Fabric.attach(handle, "a")
    wrong = {
        "another box": {"boot_id": "0"},
        "is gone": {"starttime": handle["starttime"] + 1},
        "another fabric": {"fabric_id": "00" * 16},
        "another spec": {"spec": pair(ring_slots=65).to_dict()},
        "closed it": {"fd": 1000},
    }
    for match, change in wrong.items():
        with pytest.raises(ChannelError, match=match):
            Fabric.attach(handle | change, "b")
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        time.sleep(0.02)
        with pytest.raises(ChannelError, match="is gone"):
            Fabric.attach(handle | {"pid": sleeper.pid}, "b")
    finally:
        sleeper.kill()
        sleeper.wait()
    same_size = pair().to_dict() | {"rings": [["b", "a"], ["a", "b"]]}
    with pytest.raises(ChannelError, match="another spec"):
        Fabric.attach(handle | {"spec": same_size}, "b")
    Fabric.attach(handle, "b").close()
    with pytest.raises(ChannelError, match="make a new fabric"):
        Fabric.attach(handle, "b")


def test_a_file_that_is_no_fabric_is_refused(fabric, tmp_path):
    handle = fabric.handle()
    size = os.fstat(handle["fd"]).st_size
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        with pytest.raises(ChannelError, match="not sealed"):
            Fabric.attach(handle | {"fd": fd}, "b")
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(ChannelError, match="not a fabric"):
            Fabric.attach(handle | {"fd": fd}, "b")
    finally:
        os.close(fd)


def test_memory_that_is_not_there_is_a_clear_error():
    spec = FabricSpec(("a",), (), (("huge", 1 << 45),))
    with pytest.raises(BudgetError, match=r"shared memory between .* 35,184,.* bytes needed"):
        Fabric.create(spec, "a")


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_stays_open_after_close(pair):
    Fabric.create(pair(), "a").close()
    before = open_files()
    for _ in range(5):
        with Fabric.create(pair(), "a") as a, Fabric.attach(a.handle(), "b") as b:
            a.sender("b").send(0, b"x")
            b.receiver("a").try_recv(bytearray(16384))
    del a, b
    assert open_files() == before
