"""A second box whose device and storage are reached by sockets: the same bits."""

import numpy as np
import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of

from fomoe.engine.local import local_logits
from fomoe.engine.requests import PromptProgress

BOXES = {"half there": (0, 1), "all there": (1,), "three of them": (0, 1, 2)}


@pytest.mark.parametrize("name", BOXES)
def test_the_same_bits_over_tcp(name, model_paths, local_models, prompt, delays):
    path, boxes = model_paths["mixed"], BOXES[name]
    total, _ = slot_bytes(path)
    with local_engine(
        path, devices=("cpu",) * len(boxes), device_box=boxes, transport="tcp", prefill_chunk=16,
        vram=max(total // 8, 2 * 3 * 160 * 1024), ram=total // 10, delay=delays(6),
    ) as engine:  # fmt: skip
        driver = engine.handles["driver"].actor
        for device, box in enumerate(boxes):
            peer = driver.fabric._remotes.get(f"gpu-{device}")
            assert (peer is None) == (box == 0)
        assert np.array_equal(engine.client.logits(prompt, 300), local_logits(path, prompt))
        events = list(engine.client.stream(greedy(prompt, 16)))
        want = local_models["mixed"].run(greedy(prompt, 16))
        assert tokens_of(events) == tokens_of(want)
        assert finished(events).receipt.decision_hash == finished(want).receipt.decision_hash
        seen = [e.processed for e in events if isinstance(e, PromptProgress)]
        assert {16, 30} <= set(seen)  # the ends of chunks; more where a chunk takes long
        assert seen == sorted(seen)
        reads = [engine.handles[f"storage-{b}"].actor.stats() for b in range(max(boxes) + 1)]
        used = [r["reads"] > 0 for r in reads]
        assert used == [b in boxes for b in range(max(boxes) + 1)]
        if len(boxes) > 1:
            # Over TCP each box has memory of its own: nothing of box 1 is read by box 0's device.
            handles = {engine.handles[f"gpu-{d}"].actor.fabric.fabric_id for d in range(len(boxes))}
            assert len(handles) == len(boxes)
