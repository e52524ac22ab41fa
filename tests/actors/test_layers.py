"""Layers on devices: the bits, text and decisions of the CPU path, whatever way a pass takes."""

import numpy as np
import pytest
from support.cpu_layers import CpuLayers
from support.local_engine import local_engine
from support.local_model import finished, greedy, tokens_of

from fomoe.actors import layers
from fomoe.config import RoutingConfig
from fomoe.engine import hosting
from fomoe.engine.local import local_logits
from fomoe.engine.requests import TokenEvent

DENSE = 4 << 20
VRAM = 1 << 30
CAPACITY = 6
MODES = {
    "exact": {},
    "car": {"quality": "car=0.6"},
    "price": {"quality": "price=0.05"},
    "kl": {"quality": "kl=0.05"},
    "touched": {"null_share": 0.5},
}


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """Devices played by the CPU kernels; returns those that were opened."""
    opened = []

    def open_model(file, spec, config, device):
        opened.append(CpuLayers(file, spec, hosting.host_options(config, spec)[device]))
        return opened[-1]

    monkeypatch.setattr(layers, "open_model", open_model)
    monkeypatch.setattr(hosting, "planned_bytes", lambda file, spec, options: DENSE)
    return opened


def told(events):
    """What a machine may not change: tokens with log probabilities, decisions, price and loss."""
    tokens = [(e.token, e.logprob, e.top) for e in events if isinstance(e, TokenEvent)]
    receipt = finished(events).receipt
    counts = receipt.substituted, receipt.lost_mass, receipt.price, receipt.shadow_kl
    return tokens, receipt.decision_hash, *counts


@pytest.fixture(scope="module")
def want(local_models, prompt):
    model = local_models["mixed"]
    return {
        mode: told(
            model.run(greedy(prompt, 24, logprobs=4, **ask), model.sequence(capacity=CAPACITY))
        )
        for mode, ask in MODES.items()
    }


@pytest.mark.parametrize("n_devices", [1, 2, 3])
@pytest.mark.parametrize("overlap", [True, False])
def test_text_and_decisions_are_those_of_the_cpu_path(
    model_paths, want, prompt, n_devices, overlap
):
    with local_engine(
        model_paths["mixed"], devices=("hip:0",) * n_devices, vram=VRAM, overlap=overlap,
        prefill_chunk=16, routing=RoutingConfig(car_capacity=CAPACITY),
    ) as engine:  # fmt: skip
        for mode, ask in MODES.items():
            got = told(list(engine.client.stream(greedy(prompt, 24, logprobs=4, **ask))))
            assert got == want[mode], mode
