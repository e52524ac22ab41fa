"""Random blocks are valid, zero-mean and of the spread that was asked for."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from synthetic.blocks import BlockPools, pack_scales, quantize_q4_k

KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q8_0")


def bytes_of(repeated, tmp_path):
    path = tmp_path / "tensor"
    with path.open("wb") as file:
        repeated.tofile(file)
    return np.fromfile(path, np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_have_mean_zero_and_the_spread_that_was_asked_for(kind, tmp_path):
    pools = BlockPools(np.random.default_rng(0), pool_bytes=1 << 19)
    raw = bytes_of(pools.matrix(kind, (256, 1024), 0.02), tmp_path)
    values = gguf.dequantize(raw.reshape(256, -1), Kind[kind])
    assert values.shape == (256, 1024)
    # 512 Ki weights whose blocks of 16 or 32 share a scale: the mean is known to about std / 100.
    assert abs(values.mean()) < 0.02 / 50
    assert values.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_each_sub_block_of_an_asymmetric_type_is_centred(kind, tmp_path):
    pools = BlockPools(np.random.default_rng(1), pool_bytes=1 << 19)
    raw = bytes_of(pools.matrix(kind, (256, 1024), 1.0), tmp_path)
    means = gguf.dequantize(raw.reshape(256, -1), Kind[kind]).reshape(-1, 32).mean(axis=1)
    # The mean of 32 independent weights has a spread of 1 / sqrt(32) = 0.18; with the minimum
    # equal to the scale (d = dmin) it would lie near 1.5.
    assert abs(means).mean() < 0.2
    assert abs(means.mean()) < 0.01


def test_a_matrix_larger_than_the_pool_goes_round_again(tmp_path):
    pools = BlockPools(np.random.default_rng(2), pool_bytes=144 * 10)
    raw = bytes_of(pools.matrix("Q4_K", (7, 1024), 1.0), tmp_path)
    assert raw.size == 7 * 4 * 144
    blocks = raw.reshape(-1, 144)
    assert (blocks[:18] == blocks[10:28]).all()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    one, two = (
        bytes_of(
            BlockPools(np.random.default_rng(5), pool_bytes=1 << 16).matrix("Q6_K", (3, 512), 1.0),
            tmp_path,
        )
        for _ in range(2)
    )
    assert (one == two).all()


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="64 weights"):
        BlockPools(np.random.default_rng(0), pool_bytes=1 << 12).matrix("Q4_K", (4, 64), 1.0)


def test_packed_scales_are_read_back_by_the_reference_dequantiser():
    scales = np.random.default_rng(3).integers(0, 64, (50, 8), dtype=np.uint8)
    blocks = np.zeros((50, 144), np.uint8)
    blocks[:, 0:2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)  # d = 1, dmin = 0
    blocks[:, 4:16] = pack_scales(scales)
    blocks[:, 16:] = 0x11  # every quant is one: the weight is the scale
    values = gguf.dequantize(blocks, Kind.Q4_K).reshape(50, 8, 32)
    assert (values == scales[:, :, None]).all()
    blocks[:, 0:4] = np.frombuffer(np.float16([0, 1]).tobytes(), np.uint8)  # d = 0, dmin = 1
    values = gguf.dequantize(blocks, Kind.Q4_K).reshape(50, 8, 32)
    assert (values == -scales[:, :, None].astype(np.float32)).all()


def test_quantised_embeddings_are_near_the_values():
    values = np.random.default_rng(4).normal(0, 3, (5, 512)).astype(np.float32)
    back = gguf.dequantize(quantize_q4_k(values), Kind.Q4_K)
    # Fifteen steps over twice the largest of 32 normal values (about 4.2 sigma): 0.28 sigma each,
    # a rounding error of 0.28 / sqrt(12) = 0.08 sigma.
    assert np.sqrt(((back - values) ** 2).mean()) < 0.1 * 3
