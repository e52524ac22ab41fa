"""The bandwidth benchmark runs to its end; what it says of an emulated GPU means nothing."""

import math
import sys
import time
from pathlib import Path

from support.emulated_gpu import emulated_gpu

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

from bandwidth import measure
from device_time import delay, ticks_launch


def numbers(result):
    for value in result.values():
        yield from numbers(value) if isinstance(value, dict) else [value]


def test_measure():
    with emulated_gpu(arena_bytes=0) as gpu:
        result = measure(gpu, 1 << 20, 2)
        values = [v for v in numbers(result) if not isinstance(v, str)]
        assert len(values) >= 15
        assert all(math.isfinite(v) for v in values), result


def test_a_delay_takes_its_time():
    with emulated_gpu(arena_bytes=0) as gpu:
        assert delay(gpu, 2000, per_us=2.5).args[0].value == 5000
        launch = ticks_launch(gpu, 20_000_000)  # of a processor's clock below 10 GHz
        start = time.perf_counter()
        gpu.launch(launch)
        gpu.runtime.synchronize(gpu.stream)
        assert time.perf_counter() - start > 2e-3
