"""The stand-in is a hard judge: what would fail on some GPU fails here, with words."""

import numpy as np
import pytest
from kernels.gpu.checked_units import OWN
from support.emulated_gpu import emulated_gpu

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.launch import Launch


@pytest.fixture
def gpu():
    with emulated_gpu(64, seed=11, units=OWN) as gpu:
        yield gpu


def run(gpu, name, group=64, shared=0):
    out = gpu.arena.take(4 * 128)
    gpu.upload(out, np.zeros(128, np.float32))
    gpu.launch(Launch(gpu.kernel("wrong", name, {}), 1, group, shared, [out]))
    return gpu.download(out, np.float32, group)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("part_barrier", "a barrier that not every thread"),
        ("part_wave", "not every lane of the wave"),
        ("two_operations", "different wave operations"),
        ("unaligned", "not a multiple of 16"),
        ("forgotten_copy", "not waited for"),
    ],
)
def test_a_wrong_kernel_fails_and_the_next_one_runs(gpu, capfd, name, says):
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        run(gpu, name, group=128)
    assert says in capfd.readouterr().err
    assert np.isnan(run(gpu, "early_read")).all()


def test_a_group_is_made_of_whole_waves(gpu, capfd):
    with pytest.raises(DeviceError):
        run(gpu, "early_read", group=32)
    assert "whole waves" in capfd.readouterr().err


def test_shared_memory_starts_as_nothing_useful(gpu):
    assert np.isnan(run(gpu, "unwritten", shared=256)).all()


def test_a_race_shows_over_seeds():
    seen = set()
    for seed in range(8):
        with emulated_gpu(64, seed, units=OWN) as gpu:
            seen.add(np.isnan(run(gpu, "race", group=128)).tobytes())
    assert len(seen) > 1


def test_a_stream_that_does_not_wait_is_found_out():
    def second_copy_is_right(seed, waits):
        with emulated_gpu(32, seed, units=OWN) as gpu:
            runtime, other = gpu.runtime, gpu.runtime.stream()
            source, result = runtime.pinned(4096), runtime.pinned(4096)
            source.array[:] = 7
            place, event = gpu.arena.take(4096), runtime.event()
            runtime.copy(place, source.address, 4096, gpu.stream)
            runtime.record(event, gpu.stream)
            if waits:
                runtime.wait(event, other)
            runtime.copy(result.address, place, 4096, other)
            runtime.synchronize(other)
            right = bool((result.array == 7).all())
            runtime.synchronize(gpu.stream)
            runtime.unpin(source)
            runtime.unpin(result)
            return right

    assert all(second_copy_is_right(seed, True) for seed in range(30))
    assert not all(second_copy_is_right(seed, False) for seed in range(30))


def test_a_copy_stays_inside_its_allocation(gpu):
    end = gpu.arena.base + gpu.arena.nbytes
    with pytest.raises(DeviceError, match="invalid argument"):
        gpu.upload(end - 8, np.zeros(16, np.uint8))
