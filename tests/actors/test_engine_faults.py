"""Drives that fail, actors that die, numbers that break: one clear end each, and no hang."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of
from support.process_counts import own_threads

from fomoe.engine.requests import PromptProgress, TokenEvent
from fomoe.errors import EngineError, StorageError
from fomoe.storage.fetch import PREFETCH

pytestmark = pytest.mark.timeout(40)


@pytest.fixture
def file(model_paths, tmp_path):
    """A copy of the model that a test may damage."""
    return shutil.copyfile(model_paths["mixed"], tmp_path / "own.gguf")


@pytest.fixture
def start(file):
    """Starts an engine with slots for a fifth of the experts."""
    total, _ = slot_bytes(file)

    def engine(**options):
        return local_engine(
            file, **({"vram": total // 8, "ram": total // 12, "prefill_chunk": 16} | options)
        )

    return engine


@pytest.fixture
def right(local_models, prompt):
    """The tokens that an undisturbed engine gives."""
    return tokens_of(local_models["mixed"].run(greedy(prompt, 8)))


def run(engine, request):
    return list(engine.client.stream(request))


def when_decoding(engine, request, action):
    """Do `action` after the second token; returns all events and the seconds from then on."""
    events, at = [], None
    for event in engine.client.stream(request):
        events.append(event)
        if at is None and len(tokens_of(events)) == 2:
            at = time.monotonic()
            action()
    return events, time.monotonic() - at


class TestReads:
    def test_a_truncated_file_ends_the_request_and_not_the_engine(self, start, file, prompt, right):
        whole = file.read_bytes()
        with start() as engine:
            assert tokens_of(run(engine, greedy(prompt, 8))) == right
            os.truncate(file, len(whole) // 3)
            end = finished(run(engine, greedy(prompt, 8)))
            assert end.reason == "error"
            assert "blk." in end.error
            assert "_exps.weight, expert" in end.error
            assert str(file) in end.error
            assert f"{len(whole):,} bytes and has {len(whole) // 3:,} now" in end.error
            assert " at byte " in end.error
            assert engine.client.status().state == "ready"
            with pytest.raises(EngineError, match="blk"):
                engine.client.logits(prompt, 300)
            # The same file again, byte for byte: what failed is read again.
            with file.open("r+b") as handle:
                handle.write(whole)
            queue = engine.handles["storage-0"].actor._queue
            assert queue.drain(5)
            events = run(engine, greedy(prompt, 8))
            assert tokens_of(events) == right
            assert finished(events).receipt.cached_tokens == 0
            engine.handles["driver"].actor._hands.host.residency.check_integrity()

    def test_resident_experts_need_no_file(self, start, file, prompt, right):
        with start(vram=1 << 30, ram=0) as engine:
            os.truncate(file, 4096)
            assert tokens_of(run(engine, greedy(prompt, 8))) == right

    def test_a_failure_in_decode_keeps_the_tokens_so_far(self, start, file, prompt, right):
        with start() as engine:
            events, _ = when_decoding(
                engine, greedy(prompt, 80), lambda: os.truncate(file, 4096)
            )  # fmt: skip
            end = finished(events)
            assert end.reason == "error"
            assert len(tokens_of(events)) < 80
            assert tokens_of(events)[:2] == right[:2]

    @pytest.mark.parametrize("seconds", [0.001, 0.05])
    def test_a_failed_prefetch_is_nobodys_error(self, start, file, prompt, right, seconds):
        """Demand reads of the same experts work: before, while and after the guess fails."""
        guesses = threading.local()

        def mark(fetch):
            guesses.now = fetch.priority == PREFETCH
            return seconds if guesses.now else 0.0

        with start(delay=mark, vram=slot_bytes(file)[0] // 3) as engine:
            storage = engine.handles["storage-0"].actor
            read, failures = storage._reader.read_piece, []

            def failing(piece, expert, slot):
                if guesses.now:
                    failures.append(expert)
                    raise StorageError(f"expert {expert}: a guess in vain")
                return read(piece, expert, slot)

            storage._reader.read_piece = failing
            for _ in range(3):
                events = run(engine, greedy(prompt, 8))
                assert finished(events).error is None
                assert tokens_of(events) == right
            assert len(failures) > 3
            engine.handles["driver"].actor._hands.host.residency.check_integrity()

    def test_a_guess_and_its_demand_fail(self, start, prompt, right):
        """The one is joined by the other while it runs, and both must be heard of."""
        broken = threading.Event()
        with start(delay=lambda fetch: 0.05 * (fetch.priority == PREFETCH)) as engine:
            storage = engine.handles["storage-0"].actor
            read = storage._reader.read_piece

            def failing(piece, expert, slot):
                if broken.is_set() and not piece[0].part.name.startswith("blk.0."):
                    raise StorageError(f"expert {expert}: broken")
                return read(piece, expert, slot)

            storage._reader.read_piece = failing
            events, seconds = when_decoding(engine, greedy(prompt, 80), broken.set)
            assert "broken" in finished(events).error
            assert seconds < 5
            broken.clear()
            assert storage._queue.drain(5)
            assert tokens_of(run(engine, greedy(prompt, 8))) == right

    def test_an_old_failure_does_not_hit_the_next_request(self, start, prompt, right):
        """All reads of a step fail; the request ends at the first, the others come later."""
        broken = threading.Event()
        with start(read_threads=1, delay=lambda fetch: 0.004 * broken.is_set()) as engine:
            storage = engine.handles["storage-0"].actor
            read = storage._reader.read_piece

            def failing(piece, expert, slot):
                if broken.is_set():
                    raise StorageError(f"expert {expert}: broken")
                return read(piece, expert, slot)

            storage._reader.read_piece = failing
            broken.set()
            assert "broken" in finished(run(engine, greedy(prompt, 8))).error
            assert storage._queue.drain(5)
            broken.clear()
            assert storage.stats()["failed"] > 1
            assert tokens_of(run(engine, greedy(prompt, 8))) == right

    def test_a_failure_while_filling_leaves_nothing(self, start, file, wait_for):
        before = own_threads()

        def cut(fetch):
            os.truncate(file, 4096)
            return 0.0

        with pytest.raises(StorageError, match=r"blk\.\d+\.ffn"), start(delay=cut):
            pytest.fail("the engine came up")
        wait_for(lambda: own_threads() <= before)


def die(*_args):
    raise RuntimeError("struck by lightning")


DEATHS = {
    "device loop": lambda engine: setattr(engine.handles["gpu-0"].actor._device, "experts", die),
    "device fabric": lambda engine: engine.handles["gpu-0"].actor.fabric.close(),
    "storage fabric": lambda engine: engine.handles["storage-0"].actor.fabric.close(),
    "driver loop": lambda engine: setattr(
        engine.handles["driver"].actor._forward.model, "close", die
    ),
    "driver fabric": lambda engine: engine.handles["driver"].actor.fabric.close(),
}


class TestDeaths:
    @pytest.mark.parametrize("name", DEATHS)
    def test_in_a_step(self, name, start, prompt, wait_for):
        with start(devices=("cpu", "cpu")) as engine:
            others = ThreadPoolExecutor(2)
            try:
                events, seconds = when_decoding(
                    engine, greedy(prompt, 80),
                    lambda: (
                        [others.submit(run, engine, greedy(prompt, 3, request_id=f"q{i}"))
                         for i in range(2)],
                        DEATHS[name](engine),
                    ),
                )  # fmt: skip
                end = finished(events)
                assert end.reason == "error"
                assert end.error
                assert seconds < 1.0
                wait_for(lambda: engine.client.status().state == "degraded", 1.0)
                assert engine.client.status().detail
            finally:
                others.shutdown()  # those that waited in the queue have ended too
            late = run(engine, greedy(prompt, 3, request_id="late"))
            assert [type(e) for e in late] == [type(end)]
            assert finished(late).reason == "error"

    @pytest.mark.parametrize("name", ["gpu-1", "storage-0", "driver"])
    def test_while_idle(self, name, start, wait_for):
        """Noticed within a second, though nobody asks for anything."""
        with start(devices=("cpu", "cpu")) as engine:
            engine.handles[name].actor.fabric.close()
            wait_for(lambda: engine.client.status().state == "degraded", 1.0)

    def test_stopping_ends_a_request_under_way(self, start, prompt):
        with start(delay=lambda fetch: 0.01) as engine:
            events, seconds = when_decoding(engine, greedy(prompt, 80), engine.stop)
            assert finished(events).reason == "error"
            assert "stopped" in finished(events).error
            assert seconds < 5.0
            assert engine.client.status().state == "stopped"


class TestRequests:
    def test_broken_numbers_end_the_request_alone(self, start, prompt, right):
        with start() as engine:
            model = engine.handles["driver"].actor._forward.model
            scores, logits = model.scores, model.logits

            def poisoned(layer, x):
                h, s = scores(layer, x)
                return h, s if layer < 2 else s * np.float32(np.nan)

            model.scores = poisoned
            end = finished(run(engine, greedy(prompt, 8)))
            assert "not finite" in end.error
            model.scores = scores
            assert tokens_of(run(engine, greedy(prompt, 8))) == right
            model.logits = lambda x, rows: logits(x, rows) * np.float32(np.nan)
            assert "not finite" in finished(run(engine, greedy(prompt, 8))).error
            model.logits = logits
            ahead = model.look_ahead
            model.look_ahead = lambda layer, x: ahead(layer, x) * np.float32(np.nan)
            assert tokens_of(run(engine, greedy(prompt, 8))) == right  # a guess is only a guess
            assert engine.client.status().state == "ready"

    def test_a_refused_request_costs_the_next_one_nothing(self, start, prompt, right):
        with start() as engine:
            run(engine, greedy(prompt, 4))
            for bad in ([], [1, 300], [-1], [1] * 5000):
                end = finished(run(engine, greedy(bad, 4)))
                assert end.reason == "error"
                assert "prompt" in end.error or "token" in end.error
            with pytest.raises(EngineError, match="vocabulary"):
                engine.client.logits([300], 300)
            # The refused logits start afresh; the others leave the state to continue from.
            events = run(engine, greedy(prompt, 8))
            assert tokens_of(events) == right
            run(engine, greedy([1, 300], 4))
            longer = [*prompt, *right, 5]
            events = run(engine, greedy(longer, 1))
            assert finished(events).receipt.cached_tokens == len(longer) - 2
            (progress, *_) = [e for e in events if isinstance(e, PromptProgress)]
            assert progress.total == len(longer)
            assert isinstance(events[-2], TokenEvent)
