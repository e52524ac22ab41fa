"""A thousand decode steps: memory stays where it is, and nothing slow is called."""

import gc
import logging
import os
import pickle
import sys
import threading
import time
import tracemalloc

import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy
from support.process_counts import own_files
from support.tiny_gguf import write_tiny

from fomoe.actors import process
from fomoe.engine.requests import Finished

WARM_UP = 60


class Gate:
    """Stops the driver before chosen decode steps, so that all threads stand still."""

    def __init__(self, model, steps):
        self._embed, self._steps, self._done = model.embed, steps, 0
        self.reached = {step: threading.Event() for step in steps}
        self.go_on = {step: threading.Event() for step in steps}
        model.embed = self

    def __call__(self, batch):
        self._done += 1
        if self._done in self._steps:
            self.reached[self._done].set()
            assert self.go_on[self._done].wait(30)
        return self._embed(batch)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    # Token ids below 257 are integers that Python shares, so the text costs no objects.
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny(folder / "tiny.gguf", layers=2, experts=6, top_k=2, vocab=259,
                      attention_interval=2, context=4096)  # fmt: skip


@pytest.fixture
def forbidden(monkeypatch):
    """Makes pickling, logging and Ray an error, in every thread."""
    calls = []

    def forbid(name):
        def fail(*args, **kwargs):
            calls.append(name)
            raise AssertionError(f"{name} in the layer loop")

        return fail

    def begin():
        for name in ("dumps", "dump", "loads", "load", "Pickler", "Unpickler"):
            monkeypatch.setattr(pickle, name, forbid(f"pickle.{name}"))
        monkeypatch.setattr(logging.Logger, "handle", forbid("logging"))
        monkeypatch.setitem(sys.modules, "ray", None)  # importing it is an error

    # The loops write their one line of status every ten seconds, between steps.
    monkeypatch.setattr(process, "_STATUS_PERIOD_S", 1e9)
    yield begin, calls
    monkeypatch.undo()


def own_growth(before, after):
    """Return the bytes by which the allocations of fomoe's own lines grew, and the worst lines."""
    lines = [
        stat for stat in after.compare_to(before, "lineno")
        if f"{os.sep}fomoe{os.sep}" in stat.traceback[0].filename
    ]  # fmt: skip
    return sum(stat.size_diff for stat in lines), [str(stat) for stat in lines[:8]]


@pytest.mark.parametrize(("share", "steps"), [(1.0, 1000), (0.4, 120)], ids=["resident", "reading"])
def test_decoding_allocates_nothing_that_stays(path, forbidden, share, steps):
    forbid, calls = forbidden
    total, _ = slot_bytes(path)
    end = WARM_UP + steps
    with local_engine(path, vram=int(total * share), ram=0) as engine:
        driver, client = engine.handles["driver"].actor, engine.client
        gate = Gate(driver._forward.model, (WARM_UP, end))
        events, text_bytes = [], []

        def read():
            stream = client.stream(greedy([3, 1, 4], end + 50, request_id="long"))
            events.extend(event for event in stream if isinstance(event, Finished))

        def stand_still(step):
            assert gate.reached[step].wait(60)
            while client._inboxes["long"]._items:
                time.sleep(0.001)
            gc.collect()
            running = driver._running
            # The text itself: 8 bytes a token, and a count by token for the penalties.
            text_bytes.append(
                sys.getsizeof(running._sequence.tokens) + sys.getsizeof(running._output_counts)
            )

        tracemalloc.start()
        try:
            reader = threading.Thread(target=read)
            reader.start()
            stand_still(WARM_UP)
            handles, threads = own_files(), threading.active_count()
            forbid()
            before = tracemalloc.take_snapshot()
            gate.go_on[WARM_UP].set()
            stand_still(end)
            after = tracemalloc.take_snapshot()
        finally:
            tracemalloc.stop()
            gate.go_on[end].set()
        assert threading.active_count() == threads
        assert own_files() == handles
        reader.join(30)
        assert calls == []
        assert finished(events).reason == "length"
        receipt = events[0].receipt
        assert (receipt.reads_nvme == 0) == (share == 1.0)
        # Some KB of what was on its way, and the newest status of some 6 KB.
        growth, lines = own_growth(before, after)
        growth -= text_bytes[1] - text_bytes[0]
        assert growth < 12 * 1024, "\n".join([f"{growth:,} bytes", *lines])
