"""An engine that starts again by itself, and one for which that does not help."""

import threading
import time

import pytest
from support.local_engine import local_engine
from support.local_model import finished, greedy, tokens_of

from fomoe.actors import supervisor as supervisor_module
from fomoe.actors.supervisor import Supervisor
from fomoe.errors import ClusterLostError, StorageError

pytestmark = pytest.mark.timeout(40)


@pytest.fixture
def starts(model_paths):
    """A start function, and a list of what it does next: an exception, or None to work."""
    engines, script = [], []

    def start():
        failure = script.pop(0) if script else None
        if failure is not None:
            raise failure
        engine = local_engine(model_paths["small"], vram=1 << 30, ram=0)
        engines.append(engine)
        return engine.__enter__()

    yield start, script, engines
    for engine in engines:
        engine.__exit__(None, None, None)


@pytest.fixture
def supervised(starts, monkeypatch):
    monkeypatch.setattr(supervisor_module, "_PAUSE_S", 0.01)
    supervisor = Supervisor(starts[0])
    yield supervisor
    supervisor.close()
    assert supervisor.status().state in ("stopped", "degraded")


@pytest.fixture
def right(local_models, prompt):
    return tokens_of(local_models["small"].run(greedy(prompt, 6)))


def kill(supervisor, name="gpu-0"):
    supervisor.running.handles[name].actor.fabric.close()


def wait_for(supervisor, condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition(supervisor.status()):
        assert time.monotonic() < deadline, supervisor.status()
        time.sleep(0.01)


def restarts_of(supervisor):
    counters = supervisor.status().counters
    prefix = "fomoe_actor_restarts_total"
    return {kind: counters[f'{prefix}{{actor="{kind}"}}'] for kind in ("driver", "gpu", "storage")}


@pytest.mark.parametrize("name", ["gpu-0", "storage-0", "driver"])
def test_a_death_ends_the_request_and_the_next_one_works(supervised, name, prompt, right):
    assert tokens_of(list(supervised.stream(greedy(prompt, 6)))) == right
    before, events = supervised.running, []

    def read():
        events.extend(supervised.stream(greedy(prompt, 4000, request_id="long")))

    reader = threading.Thread(target=read)
    reader.start()
    while not tokens_of(events[:]) and reader.is_alive():
        time.sleep(0.001)
    kill(supervised, name)
    reader.join(5)
    assert finished(events).reason == "error"
    wait_for(supervised, lambda s: s.state == "ready" and supervised.restarts == 1)
    assert supervised.running is not before
    kind = name.partition("-")[0]
    assert restarts_of(supervised) == dict.fromkeys(("driver", "gpu", "storage"), 0) | {kind: 1}
    assert tokens_of(list(supervised.stream(greedy(prompt, 6)))) == right
    assert before.client.status().state == "stopped"


def test_a_request_during_the_restart_ends_with_an_error(supervised, starts, prompt):
    hold = threading.Event()
    start = supervised._start
    supervised._start = lambda: (hold.wait(10), start())[1]
    kill(supervised)
    wait_for(supervised, lambda s: "started again" in s.detail)
    assert supervised.status().state == "degraded"
    end = finished(list(supervised.stream(greedy(prompt, 6, request_id="early"))))
    assert end.reason == "error"
    hold.set()
    wait_for(supervised, lambda s: s.state == "ready")


def test_a_start_that_fails_is_tried_again(supervised, starts, prompt, right):
    starts[1].extend([StorageError("the drive is not there yet"), RuntimeError("nor now")])
    kill(supervised)
    wait_for(supervised, lambda s: s.state == "ready" and supervised.restarts == 3)
    assert tokens_of(list(supervised.stream(greedy(prompt, 6)))) == right


def test_it_gives_up_and_says_why(supervised, starts, prompt):
    starts[1].extend([StorageError("the drive is gone")] * 9)
    kill(supervised)
    wait_for(supervised, lambda s: "did not help" in s.detail)
    status = supervised.status()
    assert status.state == "stopped"
    assert "the drive is gone; 3 restarts" in status.detail
    assert restarts_of(supervised) == {"driver": 0, "gpu": 3, "storage": 0}
    assert supervised.restarts == 3
    assert finished(list(supervised.stream(greedy(prompt, 1)))).reason == "error"


def test_a_cluster_that_has_ended_is_not_asked_again(supervised, starts):
    starts[1].extend([ClusterLostError("the Ray cluster has ended")] * 3)
    kill(supervised)
    wait_for(supervised, lambda s: s.state == "stopped")
    assert supervised.status().detail == "the Ray cluster has ended"
    assert supervised.restarts == 1


def test_deaths_in_a_row_use_the_restarts_up(supervised):
    for number in range(3):
        kill(supervised)
        wait_for(
            supervised, lambda s, n=number: s.state == "ready" and supervised.restarts == n + 1
        )
    kill(supervised)
    wait_for(supervised, lambda s: "did not help" in s.detail)
    assert supervised.restarts == 3
