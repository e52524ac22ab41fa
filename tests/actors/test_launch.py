"""Bringing an engine up: what is reported on the way, and what is left when it fails."""

import gc
import threading
from concurrent.futures import Future

import pytest
from support import local_engine as support
from support.local_engine import local_engine
from support.local_model import greedy, tokens_of
from support.process_counts import own_files, own_threads

from fomoe.actors import gpu
from fomoe.actors import launch as bring_up
from fomoe.actors.channel import Fabric
from fomoe.errors import BudgetError, ChannelError, DeviceError, EngineError, StorageError


@pytest.fixture
def nothing_left(wait_for):
    """After the test, threads and open files are what they were before."""
    threads, files = own_threads(), own_files()
    yield
    wait_for(lambda: own_threads() <= threads)
    gc.unfreeze()
    gc.collect()  # what the exception's traceback held
    wait_for(lambda: own_files() <= files)


def test_loading_is_reported_from_nothing_to_all(model_paths, monkeypatch, prompt, local_models):
    seen, launch = [], support.launch

    def with_progress(*args):
        return launch(*args, on_progress=lambda done, what: seen.append((done, what)))

    monkeypatch.setattr(support, "launch", with_progress)
    with local_engine(
        model_paths["mixed"], vram=1 << 30, ram=0, delay=lambda fetch: 0.01
    ) as engine:  # fmt: skip
        shares = [done for done, _ in seen]
        assert shares == sorted(shares)
        assert any(0.5 < share < 1.0 for share in shares)
        assert shares[-1] == 1.0
        assert {what for _, what in seen} == {"loading experts"}
        assert engine.client.status().state == "ready"
        assert engine.client.status().load_progress == 1.0
        want = tokens_of(local_models["mixed"].run(greedy(prompt, 2)))
        assert tokens_of(list(engine.client.stream(greedy(prompt, 2)))) == want


@pytest.mark.usefixtures("nothing_left")
class TestFailures:
    def test_a_budget_too_small(self, model_paths):
        with (
            pytest.raises(BudgetError, match="at least"),
            local_engine(model_paths["mixed"], vram=4096, ram=0),
        ):
            pytest.fail("it came up")

    def test_a_device_that_is_not_there(self, model_paths, monkeypatch):
        def refuse(name, **options):
            raise DeviceError(f"device {name!r}: no such device")

        monkeypatch.setattr(gpu, "open_device", refuse)
        with (
            pytest.raises(DeviceError, match="cpu:7"),
            local_engine(model_paths["small"], devices=("cpu:7",), vram=1 << 24, ram=0),
        ):
            pytest.fail("it came up")

    @pytest.mark.parametrize("role", ["driver", "gpu", "storage"])
    def test_an_actor_that_cannot_be_made(self, model_paths, monkeypatch, role):
        def refuse(name):
            raise OSError(f"no room for {name}")

        monkeypatch.setitem(support._CLASSES, role, refuse)
        with (
            pytest.raises(OSError, match="no room"),
            local_engine(model_paths["small"], vram=1 << 24, ram=0),
        ):
            pytest.fail("it came up")

    def test_an_actor_that_does_not_answer(self, model_paths, monkeypatch):
        release = threading.Event()

        class Sleeper(support._CLASSES["driver"]):
            def start(self, arm):
                release.wait(10.0)

        monkeypatch.setattr(bring_up, "_CALL_S", 2.0)
        monkeypatch.setattr(bring_up, "_STOP_S", 0.2)
        monkeypatch.setitem(support._CLASSES, "driver", Sleeper)
        with (
            pytest.raises(EngineError, match="an actor has not answered within 2 s"),
            local_engine(model_paths["small"], vram=1 << 24, ram=0),
        ):
            pytest.fail("it came up")
        release.set()

    def test_a_fabric_that_cannot_be_attached(self, model_paths, monkeypatch):
        def refuse(handle, me):
            raise ChannelError(f"{me} is not let in")

        monkeypatch.setattr(Fabric, "attach", refuse)
        with (
            pytest.raises(ChannelError, match="not let in"),
            local_engine(model_paths["small"], vram=1 << 24, ram=0),
        ):
            pytest.fail("it came up")

    def test_a_file_that_changed_since_it_was_opened(self, model_paths, monkeypatch, tmp_path):
        own = tmp_path / "own.gguf"
        own.write_bytes(model_paths["small"].read_bytes())
        launch = support.launch

        def cut_first(*args):
            with own.open("r+b") as handle:
                handle.truncate(own.stat().st_size - 4096)
            return launch(*args)

        monkeypatch.setattr(support, "launch", cut_first)
        with (
            pytest.raises(StorageError, match="instead of"),
            local_engine(own, vram=1 << 24, ram=0),
        ):
            pytest.fail("it came up")

    def test_an_engine_that_is_stopped_twice(self, model_paths):
        with local_engine(model_paths["small"], vram=1 << 24, ram=0) as engine:
            engine.stop()
            assert engine.client.status().state == "stopped"


def test_what_an_actor_said_is_told_without_its_stack():
    class OfRayError(Exception):
        cause = StorageError("the trace cannot be written")

    calls = [Future(), Future()]
    calls[0].set_result(1)
    calls[1].set_exception(OfRayError("a stack of forty lines"))
    with pytest.raises(StorageError, match="cannot be written"):
        bring_up._results(calls, 1.0)
    OfRayError.cause = ValueError("nobody meant this")
    with pytest.raises(OfRayError, match="forty lines"):
        bring_up._results(calls, 1.0)
