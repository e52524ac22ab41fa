"""Where experts lie, when their bytes come and over how many devices: speed, never a bit.

Every run has device and RAM slots for about a fifth of the experts, so nearly every step reads,
demotes and drops. The reference holds all experts in one process, without actors.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy

from fomoe.engine.local import local_logits
from fomoe.engine.requests import TokenEvent

TOKENS = 32


@dataclass(frozen=True)
class Case:
    devices: int = 1
    vram_share: float = 0.12  # of all experts, over all devices
    ram_share: float = 0.08
    delay: int | None = None  # seed
    options: dict = field(default_factory=dict)


CASES = {
    "exclusive": Case(),
    "inclusive, one reader": Case(
        delay=5, options={"ram_policy": "inclusive", "prefill_chunk": 7, "read_threads": 1}
    ),
    "no prefetch": Case(delay=1, options={"prefetch": False, "prefill_chunk": 1}),
    "serial": Case(delay=2, options={"overlap": False, "prefill_chunk": 64}),
    "no ram, lru": Case(vram_share=0.2, ram_share=0.0, options={"eviction": "lru"}),
    "three devices": Case(devices=3, delay=3, options={"prefill_chunk": 64}),
    "three, inclusive": Case(
        devices=3, delay=4, options={"ram_policy": "inclusive", "prefill_chunk": 7}
    ),
    "three, serial": Case(devices=3, options={"overlap": False, "prefill_chunk": 1}),
    "all resident": Case(vram_share=1.0, ram_share=0.0),
}


@pytest.fixture(scope="module")
def reference(model_paths, local_models, prompt):
    """Logits of the prompt, and the greedy answer with its decision hash, by model."""
    known = {}

    def of(name):
        if name not in known:
            logits = local_logits(model_paths[name], prompt)
            events = local_models[name].run(greedy(prompt, TOKENS, logprobs=12))
            known[name] = logits, answer(events), finished(events).receipt.decision_hash
        return known[name]

    return of


def answer(events):
    """Tokens with their log probabilities, which tell the logits' bits apart."""
    return [replace(e, request_id="") for e in events if isinstance(e, TokenEvent)]


@pytest.mark.parametrize(("name", "case"), [
    *(("mixed", case) for case in CASES),
    *(("fused", case) for case in ("exclusive", "inclusive, one reader", "three devices")),
])  # fmt: skip
def test_the_same_bits(name, case, model_paths, reference, prompt, delays):
    c, path = CASES[case], model_paths[name]
    logits, want, want_hash = reference(name)
    total, experts = slot_bytes(path)
    vram = int(total * c.vram_share / c.devices) if c.vram_share < 1 else total
    least = 2 * 3 * 160 * 1024 if c.vram_share < 1 else 0  # top-3 of both size classes
    delay = None if c.delay is None else delays(c.delay)
    with local_engine(
        path, devices=("cpu",) * c.devices, vram=max(vram, least), ram=int(total * c.ram_share),
        delay=delay, **({"prefill_chunk": 64} | c.options),
    ) as engine:  # fmt: skip
        slots = sum(engine.plan.topology.device_slots.values())
        slots += sum(engine.plan.topology.ram_slots.values())
        assert slots == experts if c.vram_share == 1 else slots < 0.4 * experts
        got = engine.client.logits(prompt, 300)
        assert np.array_equal(got, logits)
        events = list(engine.client.stream(greedy(prompt, TOKENS, logprobs=12)))
        end = finished(events)
        assert answer(events) == want
        assert end.receipt.decision_hash == want_hash
        check_receipt(end.receipt, engine, len(prompt), c)
        engine.handles["driver"].actor._hands.host.residency.check_integrity()


def check_receipt(receipt, engine, n_prompt, case):
    t = engine.plan.topology
    activations = t.n_layers * 3
    decode = receipt.hits_device + receipt.hits_ram + receipt.reads_nvme
    prompt = receipt.prompt_hits_device + receipt.prompt_hits_ram + receipt.prompt_reads_nvme
    assert decode == activations * (TOKENS - 1)  # the last token is not run through the layers
    assert prompt == activations * n_prompt
    assert receipt.substituted == 0
    assert receipt.mode == "exact"
    if case.vram_share == 1:
        assert (receipt.hits_ram, receipt.reads_nvme, receipt.nvme_bytes) == (0, 0, 0)
        assert (receipt.ram_bytes, receipt.demoted_bytes) == (0, 0)
    else:
        assert receipt.reads_nvme > 0
        assert receipt.nvme_bytes > 0
    if case.ram_share == 0:
        assert receipt.hits_ram == receipt.prompt_hits_ram == 0


def test_sampled_text_too(model_paths, local_models, prompt, delays):
    request = greedy(prompt, 20, sampling=replace(greedy([1], 1).sampling, temperature=1.3, seed=5))
    want = local_models["mixed"].run(request)
    total, _ = slot_bytes(model_paths["mixed"])
    with local_engine(
        model_paths["mixed"], vram=total // 6, ram=total // 12, delay=delays(9)
    ) as engine:
        got = list(engine.client.stream(request))
    assert answer(got) == answer(want)
    assert finished(got).receipt.decision_hash == finished(want).receipt.decision_hash
