"""Tiers over GPUs that the CPU plays: real kernels, copies beside them, and not a bit off."""

import random
import threading

import numpy as np
import pytest
from support.emulated_gpu import install_standin
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of
from support.tiny_gguf import write_tiny

from fomoe.actors.layers import LayerActor
from fomoe.actors.storage import StorageActor
from fomoe.config import EngineConfig
from fomoe.engine.hosting import dense_bytes
from fomoe.engine.requests import TokenEvent
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.gpu.host import GPUModel

pytestmark = pytest.mark.timeout(240)  # kernels are compiled where the cache has none

COUNT, CHUNK, CTX = 5, 16, 32
PROMPT = [(7 * i * i + 3 * i + 11) % 256 for i in range(9)]


@pytest.fixture(scope="module", autouse=True)
def standin():
    install_standin()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(
        tmp_path_factory.mktemp("m") / "m.gguf", layers=4, experts=12, top_k=2, quant="Q4_K",
        vocab=288, attention_interval=2,
    )  # fmt: skip


def run(path, devices, **options):
    """Return logits of the prompt, those of generated tokens, the tokens and their receipt."""
    with local_engine(
        path, devices=devices, prefill_chunk=CHUNK, ctx_size=CTX, **options
    ) as engine:
        logits = engine.client.logits(PROMPT, 288)
        events = list(engine.client.stream(greedy(PROMPT, COUNT, logits=True)))
        rows = [event.logits for event in events if isinstance(event, TokenEvent)]
        return logits, rows, tokens_of(events), finished(events).receipt


@pytest.fixture(scope="module")
def whole(path):
    """One device that holds everything, a message a token."""
    return run(path, ("hip:0",), vram=1 << 30)


def share_of(path, devices, vram, ram, options):
    """Budgets that hold a share of the experts in VRAM, and in RAM with what passes through."""
    file = open_gguf(path)
    config = EngineConfig(
        model=path, devices=devices, ctx_size=CTX, prefill_chunk=CHUNK,
        attention=options.get("attention", "auto"),
    )  # fmt: skip
    total, _ = slot_bytes(path)
    dense = max(dense_bytes(file, read_spec(file), config))
    return {"vram": dense + int(vram * total) // len(devices), "ram": int(ram * total)}


def shuffled(seed):
    draw, lock = random.Random(seed), threading.Lock()

    def delay(fetch):
        with lock:
            return draw.choice([0.0, 0.0, 0.0005, 0.004])

    return delay


@pytest.mark.parametrize(
    ("n_devices", "options"),
    [
        (1, {}),
        (1, {"overlap": False, "ram_policy": "inclusive"}),
        (2, {"prefetch_budget": 1.0, "delay": shuffled(1)}),
        (2, {"prefetch": False, "ram_policy": "inclusive", "delay": shuffled(2)}),
        (2, {"attention": "driver", "prefetch_budget": 1.0, "delay": shuffled(3)}),
    ],
)
def test_tiers_change_no_bit(path, whole, monkeypatch, n_devices, options):
    devices, hits, back_hits = ("hip:0",) * n_devices, [], GPUModel.back_hits

    def noted(model, layer, routes, late):
        hits.append(late)
        back_hits(model, layer, routes, late)

    monkeypatch.setattr(GPUModel, "back_hits", noted)
    logits, rows, tokens, receipt = run(
        path, devices, **options, **share_of(path, devices, 0.3, 0.45, options)
    )
    assert receipt.nvme_bytes > 0
    assert hits, "nothing ran before all was there"
    assert rows == whole[1]
    assert tokens == whole[2]
    assert receipt.decision_hash == whole[3].decision_hash
    assert np.array_equal(logits, whole[0])


def test_experts_computed_in_ram_change_nothing_but_rounding(path, whole, monkeypatch):
    """A prompt not at all. The table comes from costs, which are measured and then forgotten."""
    measured = []

    def measure(method, told):
        def cost(actor):
            measured.append(method(actor))
            return told

        return cost

    monkeypatch.setattr(LayerActor, "arm_costs", measure(LayerActor.arm_costs, (3.0, 1.0)))
    monkeypatch.setattr(StorageActor, "arm_cost", measure(StorageActor.arm_cost, 2.0))
    devices = ("hip:0",) * 2
    budgets = share_of(path, devices, 0.3, 0.45, {})
    logits, rows, _, receipt = run(path, devices, cpu_arm="auto", **budgets)
    *of_devices, processor = measured
    assert len(of_devices) == 2
    assert all(0 < cost < 1 for cost in (*of_devices[0], *of_devices[1], processor))
    assert receipt.cpu_arm == "0 1 1"
    assert receipt.computed_in_ram > 0
    assert np.array_equal(logits, whole[0])
    assert rows[0] == whole[1][0], "that of the prompt"
    second, wanted = (np.frombuffer(got[1], np.float32) for got in (rows, whole[1]))
    # As far as one rounding to int8 that falls to the other side moves a logit.
    np.testing.assert_allclose(second, wanted, atol=0.02 * wanted.std())
    assert (second != wanted).any()
