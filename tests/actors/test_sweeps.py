"""Sweeps through an engine: what is read, in which order, and what faults on the way lead to."""

import os
import threading
import time

import numpy as np
import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import LocalModel, finished, greedy, tokens_of
from support.tiny_gguf import write_tiny

from fomoe.engine.local import local_logits
from fomoe.engine.requests import PromptProgress
from fomoe.errors import StorageError
from fomoe.storage.fetch import PREFETCH

pytestmark = pytest.mark.timeout(60)
LAYERS, EXPERTS = 4, 48


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Four layers of 48 experts of one size, of which a chunk wants nearly all."""
    return write_tiny(
        tmp_path_factory.mktemp("sweeps") / "m.gguf", seed=5, layers=LAYERS, experts=EXPERTS,
        top_k=3, vocab=300, quant="Q4_K", attention_interval=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def long_prompt():
    return [(11 * i * i + 7 * i + 3) % 300 for i in range(160)]


@pytest.fixture(scope="module")
def right(path, long_prompt):
    local = LocalModel(path)
    return tokens_of(local.run(greedy(long_prompt, 6), local.sequence(ctx=256)))


class Reads:
    """Every read that storage was asked for, in the order in which it began."""

    def __init__(self, engine):
        queue = engine.handles["storage-0"].actor._queue
        self.begun = []
        self.queue = queue
        queue._delay = self

    def __call__(self, fetch):
        self.begun.append(fetch)
        return 0.0

    def of_layer(self, layer):
        return [f.expert for f in self.begun if f.layer == layer]


def start(path, share, **options):
    total, _ = slot_bytes(path)
    return local_engine(
        path, vram=int(total * share), ram=0, **({"prefill_chunk": 160} | options)
    )  # fmt: skip


def residency_of(engine):
    return engine.handles["driver"].actor._hands.host.residency


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("prefetch", [True, False])
def test_each_expert_is_read_once_in_file_order(path, long_prompt, right, share, prefetch):
    with start(path, share, prefetch=prefetch, read_threads=1) as engine:
        before = residency_of(engine).mask
        held = [set(np.flatnonzero(before(layer)).tolist()) for layer in range(LAYERS)]
        reads = Reads(engine)
        events = list(engine.client.stream(greedy(long_prompt, 1)))
        counters = residency_of(engine).counters
        assert tokens_of(events) == right[:1]
        for layer in range(LAYERS):
            order = reads.of_layer(layer)
            assert len(order) == len(set(order)), "read twice"
            if not prefetch:  # wrong guesses stand out of the order
                assert order == sorted(order)
            # What was resident may have had to make room before its turn, but is hardly all.
            assert len(order) < EXPERTS or share < 0.2
        total = sum(len(reads.of_layer(layer)) for layer in range(LAYERS))
        receipt = finished(events).receipt
        assert receipt.nvme_bytes == sum(
            engine.plan.table.expert_bytes(layer)
            for layer, _ in {(f.layer, f.expert) for f in reads.begun}
        )
        used = receipt.prompt_hits_device + receipt.prompt_reads_nvme
        assert used == LAYERS * 3 * len(long_prompt)
        assert counters.lookups.sum() <= total + sum(map(len, held))
        residency_of(engine).check_integrity()


def test_the_next_chunk_finds_what_was_kept(path, long_prompt):
    with start(path, 0.5, prefill_chunk=40) as engine:
        list(engine.client.stream(greedy(long_prompt, 1)))
        residency = residency_of(engine)
        assert residency.counters.lookups[:, 0].min() > 0.2 * residency.counters.lookups.sum() / 4
        residency.check_integrity()


def test_guesses_are_read_ahead_and_counted(path, long_prompt, right):
    with start(path, 0.3) as engine:
        reads = Reads(engine)
        events = list(engine.client.stream(greedy(long_prompt, 1)))
        assert tokens_of(events) == right[:1]
        guessed = [f for f in reads.begun if f.priority == PREFETCH]
        host = engine.handles["driver"].actor._hands.host.counters
        counters = residency_of(engine).counters
        assert guessed
        assert host.prefetch_issued >= len(guessed)
        assert counters.prefetch_used.sum() > 0
        assert counters.prefetches.sum() == host.prefetch_issued


def test_all_resident_reads_nothing(path, long_prompt, right):
    with start(path, 1.1) as engine:
        reads = Reads(engine)
        assert tokens_of(engine.client.stream(greedy(long_prompt, 6))) == right
        assert not reads.begun


@pytest.mark.parametrize("chunk", [33, 100])
@pytest.mark.parametrize("devices", [1, 3])
def test_the_same_bits_while_reads_dawdle(path, long_prompt, delays, chunk, devices):
    want = local_logits(path, long_prompt, chunk=16)
    total, _ = slot_bytes(path)
    with local_engine(
        path, devices=("cpu",) * devices, vram=total // 6 // devices, ram=total // 10,
        prefill_chunk=chunk, delay=delays(chunk),
    ) as engine:  # fmt: skip
        for _ in range(2):
            assert np.array_equal(engine.client.logits(long_prompt, 300), want)
        residency_of(engine).check_integrity()


class Faults:
    """Fails or holds reads of experts from `layer` on, as long as it is told to."""

    def __init__(self, engine, layer):
        self.reader = engine.handles["storage-0"].actor._reader
        self.read, self.layer = self.reader.read_piece, layer
        self.failing, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.count = 0
        self.reader.read_piece = self

    def __call__(self, piece, expert, slot):
        if int(piece[0].part.name.split(".")[1]) >= self.layer:
            assert self.gate.wait(30)
            self.count += 1
            if self.failing.is_set() and self.count > 5:
                raise StorageError(f"expert {expert}: broken")
        return self.read(piece, expert, slot)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_failed_read_ends_the_request_and_loses_nothing(path, long_prompt, right, layer):
    with start(path, 0.2) as engine:
        faults = Faults(engine, layer)
        for _ in range(3):
            faults.failing.set()
            faults.count = 0
            end = finished(list(engine.client.stream(greedy(long_prompt, 6))))
            assert end.reason == "error"
            assert "broken" in end.error
            faults.failing.clear()
            residency_of(engine).check_integrity()
            assert tokens_of(engine.client.stream(greedy(long_prompt, 6))) == right
        assert engine.client.status().state == "ready"
        residency_of(engine).check_integrity()


def test_a_file_cut_short_ends_the_request(path, long_prompt, tmp_path):
    copy = tmp_path / "m.gguf"
    copy.write_bytes(path.read_bytes())
    with start(copy, 0.2) as engine:
        os.truncate(copy, copy.stat().st_size // 2)
        end = finished(list(engine.client.stream(greedy(long_prompt, 6))))
        assert "bytes early" in end.error
        residency_of(engine).check_integrity()


def test_a_pass_that_fails_between_begin_and_finish(path, long_prompt, right):
    with start(path, 0.2) as engine:
        model = engine.handles["driver"].actor._forward.model
        shared = model.shared

        def broken(layer, h):
            if layer == 2:
                raise StorageError("struck by lightning")
            return shared(layer, h)

        model.shared = broken
        assert "lightning" in finished(list(engine.client.stream(greedy(long_prompt, 6)))).error
        model.shared = shared
        assert tokens_of(engine.client.stream(greedy(long_prompt, 6))) == right
        residency_of(engine).check_integrity()


@pytest.mark.parametrize("layer", [0, 2])
def test_a_cancelled_prompt_ends_inside_a_layer(path, long_prompt, right, layer):
    """The reads of a layer hang; the reader goes away; the engine is there for the next one."""
    with start(path, 0.2) as engine:
        driver = engine.handles["driver"].actor
        faults = Faults(engine, layer)
        faults.gate.clear()
        stream = engine.client.stream(greedy(long_prompt, 6, request_id="gone"))
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        while not driver._hands.host.sweeps.active:
            time.sleep(0.001)
        time.sleep(0.05)
        engine.client.cancel("gone")
        deadline = time.monotonic() + 2
        while driver._running is not None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        reader.join(5)
        assert not reader.is_alive()
        faults.gate.set()
        assert tokens_of(engine.client.stream(greedy(long_prompt, 6))) == right
        residency_of(engine).check_integrity()


def test_progress_comes_inside_a_chunk(path, long_prompt, monkeypatch):
    monkeypatch.setattr("fomoe.engine.generation.PROGRESS_S", 0.0)
    with start(path, 0.2, prefill_chunk=100) as engine:
        events = list(engine.client.stream(greedy(long_prompt, 1)))
        progress = [e for e in events if isinstance(e, PromptProgress)]
        done = [e.processed for e in progress]
        assert done == [25, 50, 75, 100, 115, 130, 145, 160]
        assert all(e.total == 160 and e.cached == 0 for e in progress)
        times = [e.time_ms for e in progress]
        assert times == sorted(times)
