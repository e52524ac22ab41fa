"""Compiler, cache, arena and names of devices: what goes wrong is said in full."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernels.gpu.checked_units import OWN
from support.emulated_gpu import emulated_gpu, install_standin

from fomoe.errors import DeviceError
from fomoe.kernels.gpu import compiler, rtc, sources
from fomoe.kernels.gpu.arena import Arena
from fomoe.kernels.gpu.compiler import Compiler
from fomoe.kernels.gpu.gpu import open_gpu, open_runtime


@pytest.fixture
def hip(monkeypatch, tmp_path):
    install_standin()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Compiler.open("hip", "cpu", OWN)


def defines(**more):
    return {"FM_WAVE": 32, "SCALE": 2, **more}


class TestCache:
    def test_a_unit_is_compiled_once(self, hip, monkeypatch):
        first = hip.image("probe", defines())
        assert first[:4] == b"\x7fELF"
        monkeypatch.setattr(compiler, "COMPILE_S", 0)
        assert hip.image("probe", defines()) == first
        assert [p.suffix for p in hip.cache.iterdir()] == [".bin"]

    def test_whatever_makes_another_code_makes_another_key(self, hip, monkeypatch):
        monkeypatch.setattr(Compiler, "_compile", lambda _self, _source, path, _: path.touch())
        hip.image("probe", defines())
        hip.image("probe", defines(FM_WAVE=64))
        hip.image("probe", defines(SCALE=3))
        Compiler("hip", "cpu", "another version", OWN, hip.cache).image("probe", defines())
        monkeypatch.setitem(rtc.OPTIONS, "hip", ("-O1",))
        hip.image("probe", defines())
        assert len(list(hip.cache.iterdir())) == 5

    def test_two_at_once_leave_one_whole_file(self, hip):
        with ThreadPoolExecutor(2) as pool:
            images = list(pool.map(lambda _: hip.image("probe", defines()), range(2)))
        assert all(image[:4] == b"\x7fELF" for image in images)
        assert len(list(hip.cache.iterdir())) == 1

    def test_several_units_keep_their_order(self, hip):
        jobs = [("probe", defines(SCALE=n)) for n in (5, 6)]
        assert hip.images(jobs) == [hip.image(*job) for job in jobs]


class TestErrors:
    def test_a_log_names_the_line(self, hip, tmp_path):
        (tmp_path / "bad.hip").write_text("\nFM_KERNEL(64) void bad(float* x) { x[0] = y; }\n")
        bad = Compiler("hip", "cpu", hip.version, tmp_path, hip.cache)
        with pytest.raises(DeviceError, match=r"(?s)bad\.hip for cpu with FM_WAVE=32 .*bad.hip:2:"):
            bad.image("bad", {"FM_WAVE": 32})
        assert list(hip.cache.iterdir()) == []

    def test_a_compiler_that_dies_is_an_error(self, hip, monkeypatch):
        monkeypatch.setattr(compiler.sys, "executable", "/bin/false")
        with pytest.raises(DeviceError, match="does not compile"):
            hip.image("probe", defines())

    def test_a_compiler_that_hangs_is_an_error(self, hip, monkeypatch):
        monkeypatch.setattr(compiler, "COMPILE_S", 0.01)
        with pytest.raises(DeviceError, match="no code after"):
            hip.image("probe", defines())

    def test_a_missing_source(self, hip):
        with pytest.raises(DeviceError, match=r"no kernel source absent\.hip"):
            hip.image("absent", defines())

    def test_an_unknown_target(self):
        with pytest.raises(DeviceError, match="no kernels for target 'spirv'"):
            sources.source_of("probe", {}, "spirv", OWN)

    def test_an_architecture_that_nvrtc_does_not_know(self):
        with pytest.raises(DeviceError, match=r"nvrtc \d+\.\d+ does not know sm_61"):
            rtc.cuda_compile("", "sm_61")

    def test_nvrtc_that_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(DeviceError, match=r"python\S* -m pip install -U 'cuda-bindings"):
            rtc.cuda_version()


class TestDevices:
    @pytest.mark.parametrize("name", ["gpu:0", "hip", "hip:x", "cuda:-1", ""])
    def test_an_unknown_name(self, name):
        with pytest.raises(DeviceError, match=r"a GPU is hip:N or cuda:N"):
            open_runtime(name)

    def test_a_device_that_is_not_there(self):
        install_standin()
        with pytest.raises(DeviceError, match="hip:7: HIP sees 2 devices"):
            open_gpu("hip:7", 0)

    @pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA driver")
    def test_no_nvidia_driver(self):
        # In a process of its own: this one may have the stand-in's driver.
        program = "from fomoe.kernels.gpu.gpu import open_runtime; open_runtime('cuda:0')"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
        assert (
            "DeviceError: cuda:0: NVIDIA's driver library libcuda.so.1 cannot be loaded"
            in done.stderr
        )

    def test_no_rocm(self):
        program = "from fomoe.kernels.gpu.gpu import open_runtime; open_runtime('hip:0')"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
            env={**os.environ, "ROCM_PATH": "/nowhere"},
        )  # fmt: skip
        assert "DeviceError: hip:0: AMD's HIP runtime cannot be loaded" in done.stderr

    def test_no_bindings_for_nvidia(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "fomoe.kernels.gpu.cuda", raising=False)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(DeviceError, match=r"python\S* -m pip install -U 'cuda-bindings"):
            open_runtime("cuda:0")


class TestMemory:
    def test_an_arena_hands_out_aligned_pieces_until_it_is_full(self):
        with emulated_gpu(arena_bytes=0, units=OWN) as gpu:
            arena = Arena(gpu.runtime, 1000)
            free = gpu.runtime.memory()[0]
            first, second = arena.take(10), arena.take(700, 16)
            assert (first % 256, second - first) == (0, 16)
            assert arena.used == 716
            with pytest.raises(DeviceError, match=r"233 bytes asked of 284 .* of 1,000"):
                arena.take(233)
            arena.close()
            assert gpu.runtime.memory()[0] == free + 1000
