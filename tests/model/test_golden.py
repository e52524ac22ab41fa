"""The engine's logits against transformers and the float64 reference, without tiers or actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference.qwen35moe_f64 import Model, Result, forward, relative_l2
from support.tiny_gguf import write_tiny

from fomoe.engine.local import local_logits

VECTORS = Path(__file__).parents[1] / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.gguf"))
QUANTISED = [name for name in NAMES if name.startswith(("narrow", "wide"))]
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip

BOUND = {"f32": 1e-4, "f16": 5e-3}
# A router logit may be off by about the logits' own relative error times its size (1.5); where
# the last chosen and the first unchosen expert are closer than this, either is right.
NEAR_TIE = {"f32": 1e-4, "f16": 5e-3}


def errors(
    actual: npt.NDArray[np.float32], result: Result, path: Path, kv: str
) -> npt.NDArray[np.float64]:
    """Relative L2 error at the positions that no near-tie of the routing reaches.

    A different expert changes the position itself and, through the states, all later ones: only
    those before the first near-tie count.
    """
    tie = result.routing_margin(Model(path).top_k) < NEAR_TIE[kv]
    end = int(np.argmax(tie)) if tie.any() else len(tie)
    assert end >= 0.75 * len(tie)
    assert actual.dtype == np.float32
    assert actual.shape == result.logits.shape
    return relative_l2(actual[:end], result.logits[:end])


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_models(name: str, kv: str) -> None:
    path, golden = VECTORS / f"{name}.gguf", np.load(VECTORS / f"{name}.npz")
    logits = local_logits(
        path, golden["tokens"].tolist(), kv_dtype=kv, activations="f32", chunk=len(golden["tokens"])
    )
    assert golden["margin"].min() > NEAR_TIE[kv]
    assert relative_l2(logits, golden["logits"]).max() <= BOUND[kv]


@pytest.mark.parametrize("name", ["f16_untied", "f32_tied", "wide_q4_k_m"])
def test_f16_cache_rounds_keys_and_values_and_nothing_else(name: str) -> None:
    path, tokens = VECTORS / f"{name}.gguf", np.load(VECTORS / f"{name}.npz")["tokens"].tolist()
    logits = local_logits(path, tokens, kv_dtype="f16", activations="f32", chunk=32)
    result = forward(path, tokens, kv="f16")
    assert relative_l2(logits, result.logits).max() <= BOUND["f32"]


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("name", ["f16_untied", "f32_fused", "narrow_q5_k_m", "wide_q4_k_m"])
def test_chunks_do_not_change_a_bit(name: str, activations: str) -> None:
    path, tokens = VECTORS / f"{name}.gguf", np.load(VECTORS / f"{name}.npz")["tokens"].tolist()
    whole, *others = (
        local_logits(path, tokens, kv_dtype="f16", activations=activations, chunk=chunk)
        for chunk in (len(tokens), 1, 7)
    )
    for other in others:
        np.testing.assert_array_equal(other, whole)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_everywhere(kind: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"layers": 2, "attention_interval": 2, "experts": 5, "top_k": 2}
    path = write_tiny(
        tmp_path / "m.gguf", quant=kind, dense=kind, value_heads=8, vocab=300, seed=7, **shape
    )
    tokens = np.random.default_rng(1).integers(0, 300, 12).tolist()
    logits = local_logits(path, tokens, kv_dtype="f32", activations="f32", chunk=12)
    assert errors(logits, forward(path, tokens), path, "f32").max() <= BOUND["f32"]


def exact_int8_pairs(path: Path, pairs: list[list[int]]) -> int:
    """How many two-token texts come out as the reference with int8 activations says.

    One of the ~3000 values of a token on the edge of two int8 steps may fall on either side and
    moves everything after it by up to a percent; short texts mostly escape that.
    """
    exact = 0
    for pair in pairs:
        logits = local_logits(path, pair, kv_dtype="f32", activations="int8", chunk=2)
        error = relative_l2(logits, forward(path, pair, activations="int8").logits)
        exact += int(error.max() <= BOUND["f32"])
    return exact


@pytest.mark.parametrize("name", QUANTISED)
def test_int8_activations_are_rounded_as_specified(name: str) -> None:
    pairs = np.load(VECTORS / f"{name}.npz")["tokens"].reshape(-1, 2).tolist()
    assert exact_int8_pairs(VECTORS / f"{name}.gguf", pairs) >= len(pairs) // 2


def test_int8_activations_stay_float_where_one_part_of_an_expert_is(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"layers": 2, "attention_interval": 2, "experts": 5, "top_k": 2}
    path = write_tiny(tmp_path / "m.gguf", quant="Q4_K_F16", vocab=300, seed=7, **shape)
    pairs = np.random.default_rng(1).integers(0, 300, (10, 2)).tolist()
    assert exact_int8_pairs(path, pairs) >= 5


@pytest.mark.parametrize(
    "shape",
    [
        {"quant": "Q4_K_M", "shard_tensors": 20, "mtp": True},
        {"quant": "Q2_K_S", "fused": True, "tied": True, "layers": 5, "attention_interval": 3},
    ],
    ids=["split-mtp", "fused-tied"],
)
def test_many_experts(shape: dict[str, Any], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", seed=3, **shape)
    tokens = np.random.default_rng(2).integers(0, 512, 20).tolist()
    logits = local_logits(path, tokens, kv_dtype="f32", activations="f32", chunk=8)
    assert errors(logits, forward(path, tokens), path, "f32").max() <= BOUND["f32"]
