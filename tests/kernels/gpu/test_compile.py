"""Every unit's machine code for every target: it exists, spills nothing and uses what it must."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from kernels.gpu.checked_units import AMD, CHECKS, source
from support.gpu_compilers import compile_amd, compile_nvidia

from fomoe.kernels.gpu.sources import FOLDER

NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AT_ONCE = 2


def problems(check, report):
    """Return what is wrong with a unit's kernels, in words."""
    where = f"{check.unit} {check.defines}"
    assert report.kernels, f"{where}: no kernel in it"
    return [
        f"{where}: {kernel}" for kernel in report.kernels if kernel.spills > 0 or kernel.stack > 0
    ]


def test_every_unit_is_checked():
    units = {path.stem for path in FOLDER.glob("*.hip")}
    assert units <= {check.unit for check in CHECKS}


@pytest.mark.parametrize("target", AMD)
def test_amd(target, tmp_path):
    def check(job):
        number, check = job
        report = compile_amd(source(check, target, AMD[target]), target, tmp_path / str(number))
        missing = [
            f"{check.unit} {check.defines}: no {name} instructions"
            for name, wanted in (("v_dot4", check.dots), ("v_wmma|v_mfma", check.tiles))
            if wanted and not any(n in report.assembly for n in name.split("|"))
        ]
        return problems(check, report) + missing

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [p for part in pool.map(check, enumerate(CHECKS)) for p in part]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("target", NVIDIA)
def test_nvidia(target):
    def check(check):
        return problems(check, compile_nvidia(source(check, target, 32), target))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [p for part in pool.map(check, CHECKS) for p in part]
    assert not found, "\n".join(found)
