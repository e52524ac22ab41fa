"""Embedding, top-k and the largest logit on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gpu_arrays import Guarded, run, step_block
from support.emulated_gpu import gpu_under_test
from support.random_blocks import random_matrix

from fomoe.errors import DeviceError
from fomoe.kernels import reference
from fomoe.kernels.gpu import sequence
from fomoe.kernels.gpu.gpu import GPU


class RawTable(NamedTuple):
    address: int
    type: int
    cols: int


@pytest.fixture(params=[32, 64])
def gpu(request: pytest.FixtureRequest) -> Iterator[GPU]:
    with gpu_under_test(request.param) as gpu:
        yield gpu


@pytest.mark.parametrize(
    ("kind", "cols"),
    [
        (Kind.F32, 40), (Kind.F16, 40), (Kind.BF16, 40), (Kind.Q5_0, 96), (Kind.Q8_0, 96),
        (Kind.Q4_K, 512), (Kind.Q5_K, 512), (Kind.Q6_K, 512), (Kind.IQ4_XS, 512),
    ],
)  # fmt: skip
def test_embedding_has_the_values_of_gguf(gpu: GPU, kind: Kind, cols: int) -> None:
    rng = np.random.default_rng(3)
    matrix = np.ascontiguousarray(random_matrix(rng, (7, cols), 0.05, kind))
    blocks = matrix.view(np.uint8).reshape(7, -1)
    table = RawTable(Guarded.of(gpu, blocks).address, int(kind), cols)
    ids = np.array([6, 0, 3], np.int32)
    expected = reference.embed(kind, blocks, ids)

    out = Guarded.empty(gpu, (3, cols), np.float32)
    step = step_block(gpu, token=3, tokens=2)
    run(gpu, sequence.embed_rows(gpu, step, table, (Guarded.of(gpu, ids).address, 3), out.address))
    found = out.read()
    np.testing.assert_array_equal(found[:2], expected[:2])
    assert (found[2].view(np.uint8) == 0xA5).all(), "a token beyond the step's was written"
    one = Guarded.empty(gpu, (cols,), np.float32)
    run(gpu, sequence.embed(gpu, step, table, one.address))
    np.testing.assert_array_equal(one.read(), expected[2])


def test_embedding_of_another_type_is_refused(gpu: GPU) -> None:
    with pytest.raises(DeviceError, match="ggml type 10"):
        sequence.embed(gpu, 0, RawTable(0, int(Kind.Q2_K), 256), 0)


@pytest.mark.parametrize(
    ("experts", "top_k", "levels"),
    [
        (6, 2, 0),
        (12, 3, 2),
        (96, 6, 5),
        (130, 32, 3),
        (512, 10, 0),
        (1024, 32, 40),
        (33, 33 - 1, 4),
    ],
)
def test_top_k_is_by_score_then_by_lower_id(
    gpu: GPU, experts: int, top_k: int, levels: int
) -> None:
    rng = np.random.default_rng(experts)
    scores = rng.standard_normal((3, experts)).astype(np.float32) * 3
    if levels:  # many ties, and both zeros
        scores = (rng.integers(-levels, levels + 1, (3, experts)) * 0.5).astype(np.float32)
        scores[scores == 0] *= rng.choice([-1.0, 1.0], (scores == 0).sum()).astype(np.float32)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    expected = np.sort(best, axis=1)
    wide = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    chosen = np.take_along_axis(wide, expected, axis=1)

    ids = Guarded.empty(gpu, (3, top_k), np.int32)
    weights = Guarded.empty(gpu, (3, top_k), np.float32)
    launch = sequence.choose_rows(
        gpu, step_block(gpu, tokens=2), (3, experts, top_k), Guarded.of(gpu, scores).address,
        (ids.address, weights.address),
    )  # fmt: skip
    run(gpu, launch)
    np.testing.assert_array_equal(ids.read()[:2], expected[:2])
    shares = chosen / chosen.sum(axis=1, keepdims=True)
    # Two exponentials and a division of float32.
    np.testing.assert_allclose(weights.read()[:2], shares[:2], rtol=1e-6)
    assert (ids.read()[2].view(np.uint8) == 0xA5).all()


def test_more_experts_than_the_kernel_takes_are_refused(gpu: GPU) -> None:
    with pytest.raises(DeviceError, match="8 of 2048"):
        sequence.choose_rows(gpu, 0, (1, 2048, 8), 0, (0, 0))


@pytest.mark.parametrize("n", [1, 70, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_largest_logit_and_the_sum_of_exponentials(gpu: GPU, n: int, ties: bool) -> None:
    rng = np.random.default_rng(n)
    logits = rng.standard_normal(n).astype(np.float32) * 5
    if ties:
        logits = np.round(logits / 8) - 2
    out = Guarded.empty(gpu, (1,), sequence.LARGEST)
    launch = sequence.largest(gpu, Guarded.of(gpu, logits).address, n, out.address)
    for _ in range(2):  # the counter has to be back at zero
        run(gpu, launch)
        found = out.read()[0]
        assert found["id"] == logits.argmax()
        assert found["logit"] == logits.max()
        wide = logits.astype(np.float64)
        # Sums of n float32 around 1.
        assert found["log_sum"] == pytest.approx(np.logaddexp.reduce(wide), abs=1e-5)
