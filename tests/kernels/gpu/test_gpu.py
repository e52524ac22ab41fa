"""The way from a unit's source to its results: compiler, loader, launch, graph."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from support.emulated_gpu import emulated_gpu

from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.step import STEP

UNITS = Path(__file__).parent / "units"


@pytest.fixture(params=[32, 64])
def gpu(request):
    with emulated_gpu(request.param, seed=7, units=UNITS) as gpu:
        yield gpu


def test_a_kernel_runs_alone_and_in_a_graph(gpu):
    x = np.arange(600, dtype=np.float32)
    step, xs, out = gpu.arena.take(STEP.itemsize), gpu.arena.take(x.nbytes), gpu.arena.take(20)
    gpu.upload(xs, x)
    gpu.upload(step, np.array((0, 5, 1, 0, 0), STEP))
    gpu.upload(out, np.full(5, -1, np.float32))
    function = gpu.kernel("probe", "sums", {"SCALE": 2})
    launch = Launch(function, 3, 256, 0, [step, xs, out, ctypes.c_int(600)])
    gpu.launch(launch)
    sums = [x[:256].sum(), x[256:512].sum(), x[512:].sum()]
    assert gpu.download(out, np.float32, 5).tolist() == [*(2 * s + 5 for s in sums), -1, -1]

    gpu.runtime.begin_capture(gpu.stream)
    gpu.launch(launch)
    graph = gpu.runtime.end_capture(gpu.stream)
    gpu.upload(step, np.array((0, 9, 1, 0, 0), STEP))
    gpu.runtime.run(graph, gpu.stream)
    assert gpu.download(out, np.float32, 3).tolist() == [2 * s + 9 for s in sums]
