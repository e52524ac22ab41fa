"""The way from a unit's source to its results by the real runtimes: load, launch, graph, events."""

import contextlib
import ctypes

import numpy as np
import pytest
from kernels.gpu.checked_units import OWN
from support.emulated_gpu import emulated_cuda, emulated_gpu, install_standin

from fomoe.errors import DeviceError
from fomoe.kernels.gpu import rtc
from fomoe.kernels.gpu.gpu import open_gpu, open_runtime
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.step import STEP

OPEN = {
    "hip:0": lambda: emulated_gpu(32, seed=7, units=OWN),
    "hip:1": lambda: emulated_gpu(64, seed=7, units=OWN),
    "cuda:0": lambda: emulated_cuda(units=OWN),
}


@pytest.fixture(params=OPEN)
def gpu(request):
    with OPEN[request.param]() as gpu:
        assert gpu.runtime.name == request.param
        yield gpu


class Sums:
    """The kernel `sums` of 600 numbers by three groups."""

    def __init__(self, gpu):
        self.gpu, self.x = gpu, np.arange(600, dtype=np.float32)
        take = gpu.arena.take
        self.step, self.out = take(STEP.itemsize), take(20)
        xs = take(self.x.nbytes)
        gpu.upload(xs, self.x)
        gpu.upload(self.out, np.full(5, -1, np.float32))
        function = gpu.kernel("probe", "sums", {"SCALE": 2})
        self.count = ctypes.c_int(600)
        self.launch = Launch(function, 3, 256, 0, [self.step, xs, self.out, self.count])

    def at(self, position):
        self.gpu.upload(self.step, np.array((0, position, 1, 0, 0), STEP))

    def expected(self, position, n=600):
        x = np.where(np.arange(768) < n, np.pad(self.x, (0, 168)), 0)
        return [*(2 * x.reshape(3, 256).sum(1) + position), -1, -1]

    def got(self):
        return self.gpu.download(self.out, np.float32, 5).tolist()


def test_a_launch_takes_the_arguments_of_its_moment(gpu):
    sums = Sums(gpu)
    sums.at(5)
    gpu.launch(sums.launch)
    sums.count.value = 300
    assert sums.got() == sums.expected(5)
    gpu.launch(sums.launch)
    assert sums.got() == sums.expected(5, 300)


def test_a_launch_that_may_start_early_is_a_launch(gpu):
    sums = Sums(gpu)
    sums.at(5)
    sums.launch.early = True
    gpu.launch(sums.launch)
    assert sums.got() == sums.expected(5)


def test_a_graph_replays_with_what_the_step_block_says(gpu):
    sums, other, event = Sums(gpu), gpu.runtime.stream(), gpu.runtime.event()
    copy = gpu.arena.take(20)
    gpu.runtime.begin_capture(gpu.stream)
    gpu.launch(sums.launch)
    gpu.runtime.record(event, gpu.stream)  # a branch on a second stream, which joins again
    gpu.runtime.wait(event, other)
    gpu.runtime.copy(copy, sums.out, 20, other)
    gpu.runtime.record(event, other)
    gpu.runtime.wait(event, gpu.stream)
    graph = gpu.runtime.end_capture(gpu.stream)
    assert sums.got() == [-1] * 5
    for position in (3, 9):
        sums.at(position)
        gpu.runtime.run(graph, gpu.stream)
        assert sums.got() == sums.expected(position)
        assert gpu.download(copy, np.float32, 5).tolist() == sums.expected(position)
    gpu.runtime.drop(graph)


def test_events_and_memory(gpu):
    runtime = gpu.runtime
    start, end, plain = runtime.event(True), runtime.event(True), runtime.event()
    assert runtime.done(plain)  # never recorded
    address, host = gpu.arena.take(1 << 16), runtime.pinned(1 << 16)
    runtime.record(start, gpu.stream)
    runtime.fill(address, 0x5A, 1 << 16, gpu.stream)
    runtime.copy(host.address, address, 1 << 16, gpu.stream)
    runtime.record(end, gpu.stream)
    runtime.record(plain, gpu.stream)
    runtime.synchronize(gpu.stream)
    assert runtime.done(plain)
    assert 0 < runtime.elapsed_ms(start, end) < 10_000
    assert (host.array == 0x5A).all()
    runtime.unpin(host)


def test_host_memory_is_pinned_where_it_lies(gpu):
    host = np.arange(4096, dtype=np.uint8)
    address, place = gpu.runtime.register(host), gpu.arena.take(4096)
    gpu.runtime.copy(place, address, 4096, gpu.stream)
    np.testing.assert_array_equal(gpu.download(place, np.uint8, 4096), host)
    gpu.runtime.unregister(host)
    with pytest.raises(DeviceError, match=r"Unregister: invalid argument \(1\)"):
        gpu.runtime.unregister(host)


def test_what_cannot_be_pinned_names_the_way_out():
    with OPEN["hip:0"]() as gpu:
        host = np.zeros(4096, np.uint8)
        gpu.runtime.register(host)
        with pytest.raises(DeviceError, match=r"4,096 bytes of RAM cannot be .* --ram-budget"):
            gpu.runtime.register(host)
        gpu.runtime.unregister(host)


def test_a_card_without_kernels_is_refused(monkeypatch):
    install_standin()
    from fomoe.kernels.gpu import hip

    monkeypatch.setattr(hip, "_TARGETS", ("gfx12",))
    with pytest.raises(DeviceError, match=r"hip:1 is a cpu: kernels are for RDNA 3 and 4"):
        open_runtime("hip:1")


def test_a_driver_too_old_for_the_compiler_is_refused(monkeypatch):
    with OPEN["cuda:0"]():
        from fomoe.kernels.gpu import cuda

        monkeypatch.setattr(cuda, "_OLDEST_DRIVER", 13010)
        with pytest.raises(DeviceError, match=r"supports CUDA 13\.0; install .* 580"):
            open_runtime("cuda:0")


def test_a_driver_that_does_not_start_says_why(gpu, monkeypatch):
    from cuda.bindings import driver
    from hip import hip

    refused = hip.hipError_t.hipErrorOutOfMemory, driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    monkeypatch.setattr(hip, "hipGetDeviceCount", lambda: (refused[0], 0))
    monkeypatch.setattr(driver, "cuInit", lambda flags: (refused[1],))
    name = gpu.runtime.name
    with pytest.raises(DeviceError, match=rf"{name}: (hipGetDeviceCount|cuInit): out of mem.* \(2"):
        open_runtime(name)


def test_a_driver_without_devices_has_none(gpu, monkeypatch):
    from cuda.bindings import driver
    from hip import hip

    none = hip.hipError_t.hipErrorNoDevice, driver.CUresult.CUDA_ERROR_NO_DEVICE
    monkeypatch.setattr(hip, "hipGetDeviceCount", lambda: (none[0], 0))
    monkeypatch.setattr(driver, "cuInit", lambda flags: (none[1],))
    with pytest.raises(DeviceError, match=r"sees 0 devices; see `(rocminfo|nvidia-smi)`"):
        open_runtime(gpu.runtime.name)


def test_what_was_opened_is_given_back(gpu):
    before = gpu.runtime.memory()[0]
    with OPEN[gpu.runtime.name]() as second:
        assert second.runtime.memory()[0] == before - second.arena.nbytes
    assert gpu.runtime.memory()[0] == before


def test_pinned_memory_goes_with_its_device():
    from hip import hip

    with OPEN["hip:0"]() as gpu:
        kept, returned = gpu.runtime.pinned(4096), gpu.runtime.pinned(4096)
        gpu.runtime.unpin(returned)
    for pinned in (kept, returned):
        (error,) = hip.hipHostFree(pinned.address)
        assert error == hip.hipError_t.hipErrorInvalidValue
    gpu.close()  # nothing is left to give back


@pytest.mark.parametrize("wrong", ["memory", "compiler"])
def test_a_device_that_is_not_taken_is_closed(monkeypatch, wrong):
    install_standin()  # before hip-python loads its libraries
    from fomoe.kernels.gpu.hip import HipRuntime

    closed = []
    monkeypatch.setattr(HipRuntime, "close", lambda runtime: closed.append(runtime.name))
    if wrong == "compiler":
        monkeypatch.setitem(rtc.COMPILERS, "hip", (no_compiler, rtc.hip_compile))
    with pytest.raises(DeviceError, match=r"in one piece|not installed"):
        open_gpu("hip:1", 16 << 30)
    assert closed == ["hip:1"]


def no_compiler():
    raise DeviceError("not installed")


def test_more_than_there_is(gpu):
    with pytest.raises(DeviceError, match=r"no 17,179,869,184 bytes in one piece; 8,\d{3},"):
        gpu.runtime.alloc(16 << 30)


def test_work_that_does_not_end_is_an_error(gpu):
    spin = Launch(gpu.kernel("delay", "delay", {}), 1, 64, 0, [ctypes.c_ulonglong(2_000_000)])
    gpu.launch(spin)
    with pytest.raises(DeviceError, match="has not ended after"):
        gpu.runtime.synchronize(gpu.stream, within_s=0.001)
    with contextlib.suppress(DeviceError):
        gpu.runtime.synchronize(gpu.stream)
