"""Every unit's machine code for every target: it exists, spills nothing and uses what it must."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from kernels.gpu.checked_units import AMD, CHECKS, source
from support.gpu_compilers import compile_amd, compile_nvidia

from fomoe.kernels.gpu.sources import FOLDER

NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
FAMILIES = ("gfx1100", "gfx1200", "gfx942", "sm_90")  # one target per set of instructions
AT_ONCE = 2


def checks(target):
    """Return all of a family's target, and each unit's first of the others."""
    firsts = {check.unit: check for check in reversed(CHECKS)}
    asked = [c for c in CHECKS if target.startswith(c.only)]
    return asked if target in FAMILIES else [c for c in asked if c is firsts[c.unit]]


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
def test_amd(target):
    def faults(check):
        report = compile_amd(source(check, target, AMD[target]), target)
        missing = [
            f"{check.unit} {check.defines}: no {name} instructions"
            for name, wanted in (("v_dot4", check.dots), ("v_wmma|v_mfma", check.tiles))
            if wanted and not any(n in report.instructions for n in name.split("|"))
        ]
        return problems(check, report) + missing

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [p for part in pool.map(faults, checks(target)) for p in part]
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def processes():
    """Two processes for NVRTC, a library: a crash of it ends no other test."""
    with ProcessPoolExecutor(AT_ONCE, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("target", NVIDIA)
def test_nvidia(target, processes):
    wanted = checks(target)
    sources = [source(check, target, 32) for check in wanted]
    reports = processes.map(compile_nvidia, sources, [target] * len(sources))
    found = [
        p for check, report in zip(wanted, reports, strict=True) for p in problems(check, report)
    ]
    assert not found, "\n".join(found)
