"""Actors as processes: the same bits, and what a SIGKILL in the middle of a step leads to."""

import os
import signal
import time

import numpy as np
import pytest
from support import local_engine as support
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of
from support.process_actor import ProcessHandle

from fomoe.engine.local import local_logits

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def engine(monkeypatch, model_paths):
    """An engine of five processes: driver, storage, two devices, and this one as the client."""
    for role in support._CLASSES:
        monkeypatch.setitem(support._CLASSES, role, lambda name, role=role: (role, name))
    monkeypatch.setattr(support, "ThreadHandle", lambda made: ProcessHandle(*made))
    path = model_paths["mixed"]
    total, _ = slot_bytes(path)
    with local_engine(path, devices=("cpu", "cpu"), vram=total // 8, ram=total // 12) as engine:
        yield engine
    assert not any(handle.process.is_alive() for handle in engine.handles.values())


def test_processes_change_nothing(engine, model_paths, local_models, prompt):
    pids = {handle.call("pid").result(5) for handle in engine.handles.values()}
    assert len(pids | {os.getpid()}) == 5
    assert np.array_equal(
        engine.client.logits(prompt, 300), local_logits(model_paths["mixed"], prompt)
    )
    got = list(engine.client.stream(greedy(prompt, 8)))
    want = local_models["mixed"].run(greedy(prompt, 8))
    assert tokens_of(got) == tokens_of(want)
    assert finished(got).receipt.decision_hash == finished(want).receipt.decision_hash


@pytest.mark.parametrize("name", ["gpu-1", "storage-0", "driver"])
def test_a_killed_process_ends_the_request_within_a_second(engine, prompt, name, wait_for):
    events, at = [], 0.0
    for event in engine.client.stream(greedy(prompt, 4000)):
        events.append(event)
        if len(tokens_of(events)) == 2 and not at:
            at = time.monotonic()
            os.kill(engine.handles[name].process.pid, signal.SIGKILL)
    assert time.monotonic() - at < 1.0
    assert finished(events).reason == "error"
    assert "died" in finished(events).error
    wait_for(lambda: engine.client.status().state == "degraded", 1.0)
    late = list(engine.client.stream(greedy(prompt, 1, request_id="late")))
    assert [e.reason for e in late] == ["error"]


def test_a_process_killed_while_idle_is_noticed(engine, wait_for):
    os.kill(engine.handles["gpu-0"].process.pid, signal.SIGKILL)
    wait_for(lambda: engine.client.status().state == "degraded", 1.0)
    assert "gpu-0 has died" in engine.client.status().detail
