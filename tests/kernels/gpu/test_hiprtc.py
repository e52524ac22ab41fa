"""Every unit through AMD's own run-time compiler, where ROCM_PATH has one; no GPU is needed.

hip-python loads its libraries once per process and other tests take the stand-in, so these run
alone: `ROCM_PATH=/opt/rocm python -m pytest tests/kernels/gpu/test_hiprtc.py`.
"""

import os
from pathlib import Path

import pytest
from kernels.gpu.checked_units import AMD, CHECKS, source

from fomoe.kernels.gpu import rtc

ROOT = Path(os.environ.get("ROCM_PATH", "/opt/rocm"))
IS_REAL = (ROOT / "lib" / "libhiprtc.so").exists() and not ROOT.name.startswith("standin-")


@pytest.mark.skipif(not IS_REAL, reason="no hiprtc in ROCM_PATH or /opt/rocm")
@pytest.mark.parametrize("target", AMD)
def test_hiprtc(target):
    if "/standin-" in os.environ.get("ROCM_PATH", ""):
        pytest.skip("this process has the stand-in; run this file alone")
    for check in CHECKS:
        assert rtc.hip_compile(source(check, target, AMD[target]), target)[:4] == b"\x7fELF"
