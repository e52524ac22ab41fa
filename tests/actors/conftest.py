import gc
import random
import threading
import time

import pytest
from support.local_model import LocalModel
from support.tiny_gguf import write_tiny

SHAPES = {
    # Two size classes: the finer type of `down` on even layers.
    "mixed": {"quant": "Q4_K_M", "layers": 4, "experts": 20, "attention_interval": 3},
    "fused": {"quant": "Q5_K_M", "layers": 4, "experts": 16, "fused": True, "dense": "Q8_0"},
    # Small and with all experts in few bytes, for tests that only need an engine.
    "small": {"quant": "Q4_K", "layers": 3, "experts": 8, "attention_interval": 2},
}


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: write_tiny(folder / f"{name}.gguf", seed=3, top_k=3, vocab=300, **shape)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="session")
def local_models(model_paths):
    """Each model in this process with every expert in memory: what tiers must not change."""
    return {name: LocalModel(path) for name, path in model_paths.items()}


@pytest.fixture(scope="session")
def prompt():
    return [(7 * i * i + 3 * i + 11) % 300 for i in range(30)]


class RandomDelays:
    """Makes some reads slow, at random but by a seed; threads may share it."""

    def __init__(self, seed, most_s=0.002, share=0.4):
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._most_s, self._share = most_s, share

    def __call__(self, fetch):
        with self._lock:
            slow = self._random.random() < self._share
            return self._random.uniform(0, self._most_s) if slow else 0.0


@pytest.fixture
def delays():
    return RandomDelays


@pytest.fixture(autouse=True)
def collect_engines():
    """Loop threads freeze the garbage of their process; here, other engines live in it."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def wait_for():
    """Waits, with a bound, until a condition holds."""

    def wait(condition, seconds=5.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    return wait
