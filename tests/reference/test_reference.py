"""The float64 reference is right: it agrees with transformers, and with itself over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference.qwen35moe_f64 import forward, relative_l2

VECTORS = Path(__file__).parents[1] / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.gguf"))
TOP_K = {"f16_untied": 3}


@pytest.mark.parametrize("name", NAMES)
def test_reference_agrees_with_the_expected_logits(name: str) -> None:
    golden = np.load(VECTORS / f"{name}.npz")
    result = forward(VECTORS / f"{name}.gguf", golden["tokens"])
    # transformers keeps norms and the delta rule in float32 (8e-6); the quantised files' logits
    # are the reference's own, so only the rounding to float32 remains.
    bound = 1e-5 if name.startswith(("f16", "f32")) else 2e-7
    assert relative_l2(golden["logits"], result.logits).max() <= bound
    margin = result.routing_margin(TOP_K.get(name, 2))
    np.testing.assert_allclose(golden["margin"], margin, rtol=1e-5)


def test_all_goldens_are_there_and_far_from_routing_ties() -> None:
    assert len(NAMES) == 9
    for name in NAMES:
        golden = np.load(VECTORS / f"{name}.npz")
        assert len(golden["tokens"]) == (64 if name.startswith(("f16", "f32")) else 24)
        assert golden["margin"].min() > 5e-3
        assert golden["logits"].std() > 1.0


def test_a_prefix_gives_the_same_logits() -> None:
    tokens = np.load(VECTORS / "f32_fused.npz")["tokens"]
    path = VECTORS / "f32_fused.gguf"
    long, short = forward(path, tokens[:20]), forward(path, tokens[:7])
    np.testing.assert_allclose(long.logits[:7], short.logits, rtol=0, atol=1e-12)


def test_rounded_cache_moves_the_logits_a_little() -> None:
    path = VECTORS / "f32_tied.gguf"
    tokens = np.load(VECTORS / "f32_tied.npz")["tokens"][:16]
    error = relative_l2(forward(path, tokens, kv="f16").logits, forward(path, tokens).logits)
    assert 1e-6 < error.max() < 5e-3
