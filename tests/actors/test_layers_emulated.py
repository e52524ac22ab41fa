"""Engines on GPUs that are played by the CPU: real runtime, real kernels, actors and messages.

The model and the chunk are those of tests/model/test_gpu_model.py, so that kernels are compiled
once for both.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.emulated_gpu import install_standin
from support.local_engine import local_engine
from support.local_model import LocalModel, finished, greedy, tokens_of

from fomoe.actors import layers
from fomoe.config import EngineConfig, RoutingConfig
from fomoe.engine.requests import TokenEvent
from fomoe.errors import DeviceError
from fomoe.gguf.reader import open_gguf
from fomoe.kernels.gpu.gpu import GPU
from fomoe.llm import LLM
from fomoe.model.archs import read_spec
from fomoe.model.gpu.host import GPUModel

pytestmark = pytest.mark.timeout(240)  # kernels are compiled where the cache has none

MODEL = Path(__file__).parents[1] / "vectors" / "wide_q4_k_m.gguf"
VRAM, COUNT, CHUNK = 1 << 30, 5, 16


@pytest.fixture(scope="module", autouse=True)
def standin():
    install_standin()


@pytest.fixture(scope="module")
def model():
    return LocalModel(MODEL)


@pytest.fixture(scope="module")
def prompt():
    return np.load(MODEL.with_suffix(".npz"))["tokens"][:9].tolist()


@pytest.fixture(scope="module")
def want(model, prompt):
    return model.run(greedy(prompt, COUNT))


def run(model, prompt, devices, **options):
    """Return logits of the prompt, those of generated tokens, the tokens and their receipt."""
    with local_engine(
        MODEL, devices=devices, vram=VRAM, prefill_chunk=CHUNK, ctx_size=32, **options
    ) as engine:
        logits = engine.client.logits(prompt, model.spec.vocab)
        events = list(engine.client.stream(greedy(prompt, COUNT, logits=True)))
        rows = [event.logits for event in events if isinstance(event, TokenEvent)]
        return logits, rows, tokens_of(events), finished(events).receipt


@pytest.fixture(scope="module")
def whole(model, prompt):
    """One device, a message a token."""
    return run(model, prompt, ("hip:0",))


def test_the_text_and_the_decisions_are_those_of_the_cpu_path(model, whole, want):
    _, _, tokens, receipt = whole
    assert tokens == tokens_of(want)
    assert receipt.decision_hash == finished(want).receipt.decision_hash
    assert receipt.hits_device == (COUNT - 1) * model.spec.n_layers * model.spec.moe.top_k


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (("hip:0",), {"overlap": False}),
        (("hip:0", "hip:0"), {}),
        (("hip:0", "hip:0"), {"overlap": False}),
        (("hip:0",), {"attention": "driver"}),
        (("hip:0", "hip:0"), {"attention": "driver"}),
    ],
)
def test_every_way_through_the_layers_has_the_same_bits(model, prompt, whole, devices, options):
    logits, rows, tokens, receipt = run(model, prompt, devices, **options)
    assert rows == whole[1]
    assert tokens == whole[2]
    assert receipt.decision_hash == whole[3].decision_hash
    assert np.array_equal(logits, whole[0])


def test_contracts_decide_and_are_watched_as_on_the_cpu(model, prompt, monkeypatch):
    watched, capacity = RoutingConfig(shadow_every=1), model.spec.moe.top_k
    monkeypatch.setattr(model, "routing", watched)
    ask = greedy(prompt, COUNT, quality="car=0.2")
    want = model.run(ask, model.sequence(capacity=capacity))
    with local_engine(
        MODEL, devices=("hip:0",), vram=VRAM, prefill_chunk=CHUNK, ctx_size=32,
        routing=replace(watched, car_capacity=capacity),
    ) as engine:  # fmt: skip
        got = list(engine.client.stream(ask))
    assert tokens_of(got) == tokens_of(want)
    a, b = finished(got).receipt, finished(want).receipt
    assert a.decision_hash == b.decision_hash
    assert a.shadow_steps == b.shadow_steps == COUNT - 1
    assert a.substituted > 0
    # Losses of some hundredths, from logits that differ by some ten thousandths.
    assert a.shadow_kl == pytest.approx(b.shadow_kl, rel=0.05)


def test_processes_and_the_death_of_one(prompt, want, wait_for):
    with LLM(
        MODEL, devices=("hip:0", "hip:0"), vram_budget=VRAM, prefill_chunk=CHUNK,
        ctx_size=32, threads=1, launcher="processes",
    ) as llm:  # fmt: skip
        ask = {"max_tokens": COUNT, "temperature": 0.0, "ignore_eos": True}
        assert llm.generate(prompt, **ask).token_ids == tokens_of(want)
        handle = llm.engine.running.handles["gpu-1"]
        os.kill(handle.process.pid, signal.SIGKILL)
        wait_for(lambda: llm.engine.restarts == 1 and llm.engine.status().state == "ready", 60)
        assert llm.generate(prompt, **ask).token_ids == tokens_of(want)


@pytest.mark.parametrize(
    ("device", "message"),
    [("hip:7", "hip:7"), ("cuda:0", "cuda:0: .*libcuda.so.1.*install NVIDIA's driver")],
)
def test_a_device_that_is_not_there_is_told_before_anything_starts(device, message):
    with pytest.raises(DeviceError, match=message):
        LLM(MODEL, devices=(device,), launcher="processes")


def test_a_device_whose_slots_cannot_be_had_is_given_back(monkeypatch):
    closed, close = [], GPU.close

    def refuse(self, counts):
        raise DeviceError("no slots")

    def note(self):
        close(self)
        closed.append(self)

    monkeypatch.setattr(GPUModel, "add_slots", refuse)
    monkeypatch.setattr(GPU, "close", note)
    file = open_gguf(MODEL)
    config = EngineConfig(model=MODEL, devices=("hip:0",), ctx_size=32, prefill_chunk=CHUNK)
    with pytest.raises(DeviceError, match="no slots"):
        layers.open_model(file, read_spec(file), config, 0, (3, 3))
    assert len(closed) == 1
