"""What the names of a kernel's world do, by the CPU prelude; compile tests see the other two."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from support.emulated_gpu import gpu_under_test

from fomoe.kernels.gpu.launch import Launch

UNITS = Path(__file__).parent / "units"


@pytest.fixture(params=[(32, 1), (64, 2)])
def gpu(request):
    with gpu_under_test(*request.param, units=UNITS) as gpu:
        yield gpu


def put(gpu, array):
    address = gpu.arena.take(array.nbytes)
    gpu.upload(address, array)
    return address


def launch(gpu, name, grid, group, args, shared=0):
    gpu.launch(Launch(gpu.kernel("names", name, {}), grid, group, shared, args))


def test_numbers(gpu):
    random = np.random.default_rng(3)
    x = np.concatenate([random.normal(0, 2, 500), random.uniform(-(2.0**18), 2.0**18, 501)])
    x = x.astype(np.float32)
    x[500:] = np.where(np.arange(501) % 2, x[500:], x[500:] / 2.0**14)
    out = put(gpu, np.full(11 * x.size, np.nan, np.float32))
    launch(gpu, "numbers", 3, 64, [put(gpu, x), out, ctypes.c_int(x.size)])
    got = gpu.download(out, np.float32, (11, x.size)).astype(np.float64)
    v = x.astype(np.float64)
    a = np.abs(v)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).astype(np.float64)
    bf16 = (x.view(np.uint32) >> 16 << 16).view(np.float32)
    exact = [half, bf16, np.maximum(v, 1), np.minimum(v, 1)]
    small = a < 80
    np.testing.assert_allclose(got[0][small], np.exp(v[small]), rtol=3e-7)
    np.testing.assert_allclose(got[1], np.log(a), rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(got[2], np.sqrt(a), rtol=6e-8)
    np.testing.assert_array_equal(got[3], np.rint(v))
    np.testing.assert_allclose(got[4], v * v - 1, rtol=6e-8)
    np.testing.assert_allclose(got[5], np.sin(v), atol=1.5e-7)
    np.testing.assert_allclose(got[6], np.cos(v), atol=1.5e-7)
    for row, expected in zip(got[7:], exact, strict=True):
        np.testing.assert_array_equal(row, expected)


def test_lanes(gpu):
    wave, random = gpu.runtime.wave, np.random.default_rng(4)
    x = random.integers(-50, 50, wave).astype(np.float32)
    a, b = random.integers(-128, 128, (2, wave, 4)).astype(np.int8)
    out = put(gpu, np.zeros(5 * wave, np.float32))
    launch(gpu, "lanes", 1, wave, [put(gpu, x), put(gpu, a), put(gpu, b), out])
    got, lane = gpu.download(out, np.float32, (5, wave)), np.arange(wave)
    np.testing.assert_array_equal(got[0], x.sum())
    np.testing.assert_array_equal(got[1], x.max())
    np.testing.assert_array_equal(got[2], x[lane ^ 1] + 1000 * x[lane ^ wave // 2])
    np.testing.assert_array_equal(got[3], (a.astype(int) * b).sum(1) + lane)
    np.testing.assert_array_equal(got[4], x[wave - 1])


def test_tiles(gpu):
    a, b = np.random.default_rng(5).integers(-128, 128, (2, 16, 64)).astype(np.int8)
    out = put(gpu, np.zeros((3, 16, 16), np.int32))
    launch(gpu, "tiles", 1, gpu.runtime.wave, [put(gpu, a), put(gpu, b), out])
    expected = [a[:, k].astype(int) @ b[:, k].T for k in (slice(64), slice(16), slice(16, 32))]
    np.testing.assert_array_equal(gpu.download(out, np.int32, (3, 16, 16)), expected)


def test_the_last_group_sees_all(gpu):
    x = np.arange(37, dtype=np.float32)
    parts, out = put(gpu, np.zeros(37, np.float32)), put(gpu, np.zeros(1, np.float32))
    count = put(gpu, np.zeros(1, np.uint32))
    for _ in range(2):
        launch(gpu, "last_group", 37, 128, [put(gpu, x), parts, count, out], shared=4)
        assert gpu.download(out, np.float32, 1) == x.sum()


def test_loads_of_16_bytes(gpu):
    x = np.arange(8, dtype=np.uint32)
    out = put(gpu, np.zeros(12, np.uint32))
    launch(gpu, "pass_on", 1, 64, [put(gpu, x), out])
    assert gpu.download(out, np.uint32, 12).tolist() == [*range(8), 1, 0, 0, 0]
