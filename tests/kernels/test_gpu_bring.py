"""Small things out of pinned host memory by a kernel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gpu_arrays import Guarded, run
from support.emulated_gpu import gpu_under_test

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.bring import add, bring
from fomoe.kernels.gpu.gpu import GPU


@pytest.fixture(params=[32, 64])
def gpu(request: pytest.FixtureRequest) -> Iterator[GPU]:
    with gpu_under_test(request.param) as gpu:
        yield gpu


@pytest.mark.parametrize("words", [1, 7, 256, 257, 4096])
def test_every_word_and_no_other_comes(gpu: GPU, words: int) -> None:
    rng = np.random.default_rng(words)
    pinned = gpu.runtime.pinned(4 * words + 8)
    pinned.array[:] = rng.integers(0, 256, pinned.array.size)
    out = Guarded.empty(gpu, (words,), np.uint32)
    run(gpu, bring(gpu, out.address, pinned.device_address + 4, 4 * words))
    assert np.array_equal(out.read(), pinned.array[4:-4].view(np.uint32))


@pytest.mark.parametrize("count", [1, 255, 4096])
def test_every_float_and_no_other_is_added(gpu: GPU, count: int) -> None:
    rng = np.random.default_rng(count)
    pinned = gpu.runtime.pinned(4 * count + 8)
    floats = pinned.array.view(np.float32)
    floats[:] = rng.normal(size=count + 2)
    before = rng.normal(size=count).astype(np.float32)
    out = Guarded.of(gpu, before)
    run(gpu, add(gpu, out.address, pinned.device_address + 4, count))
    assert np.array_equal(out.read(), before + floats[1:-1])


def test_bytes_that_are_no_words_are_refused(gpu: GPU) -> None:
    with pytest.raises(DeviceError, match="6 bytes"):
        bring(gpu, 256, 512, 6)
