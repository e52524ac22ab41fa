"""The random models are what they say: valid, reproducible, zero-mean, of the asked shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from reference.qwen35moe_f64 import forward
from support.random_blocks import random_matrix
from support.tiny_gguf import write_tiny
from support.tiny_tokenizer import tokenizer_json

KINDS = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]
SMALL: dict[str, Any] = {
    "layers": 2,
    "experts": 6,
    "top_k": 2,
    "attention_interval": 2,
    "vocab": 300,
}


@pytest.mark.parametrize("name", KINDS)
def test_random_blocks_are_zero_mean_and_as_wide_as_asked(name: str) -> None:
    kind = Kind[name]
    stored = random_matrix(np.random.default_rng(1), (512, 512), 0.05, kind)
    values = gguf.dequantize(stored, kind)
    assert values.shape == (512, 512)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(0.05, rel=0.1)
    assert abs(values.mean()) < 0.05 * 0.02


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_tiny(tmp_path / "a.gguf", seed=3, **SMALL).read_bytes()
    assert first == write_tiny(tmp_path / "b.gguf", seed=3, **SMALL).read_bytes()
    assert first != write_tiny(tmp_path / "c.gguf", seed=4, **SMALL).read_bytes()


def test_shards_and_a_multi_token_block_leave_the_logits_alone(tmp_path: Path) -> None:
    shape = {**SMALL, "quant": "Q4_K_M"}
    whole = forward(write_tiny(tmp_path / "whole.gguf", **shape), range(8))
    path = write_tiny(tmp_path / "split.gguf", mtp=True, shard_tensors=9, **shape)
    assert path.name == "split-00001-of-00007.gguf"
    np.testing.assert_array_equal(forward(path, range(8)).logits, whole.logits)
    assert 1.0 < whole.logits.std() < 5.0


def test_fused_gate_and_up_differ_only_in_layout(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "fused.gguf", fused=True, tied=True, **SMALL)
    names = {t.name for t in gguf.GGUFReader(path).tensors}
    assert "blk.0.ffn_gate_up_exps.weight" in names
    assert not {"blk.0.ffn_gate_exps.weight", "output.weight"} & names
    assert 1.0 < forward(path, range(8)).logits.std() < 5.0


@pytest.mark.parametrize("vocab", [259, 512, 2000])
def test_vocabulary_is_complete_and_its_merges_are_well_formed(vocab: int) -> None:
    data = tokenizer_json(vocab)
    ids = [*data["model"]["vocab"].values(), *(t["id"] for t in data["added_tokens"])]
    assert ids == list(range(vocab))
    for merge in data["model"]["merges"]:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= data["model"]["vocab"].keys()
