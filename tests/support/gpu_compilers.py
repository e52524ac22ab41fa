"""What compilers say of a kernel's machine code, on a machine without a GPU.

AMD: clang of the `ziglang` package, in three steps as zig's driver runs no linker for HIP.
NVIDIA: NVRTC, whose assembler reports registers and stack.

A compiler is asked once: what it says of the same source for the same target is kept on disk, by
all of the three and this file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import ziglang
from cuda.bindings import nvrtc

from fomoe.config import cache_dir

_STEP_S = 100
_CLANG_TARGET = ("-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output")
_CLANG_BARE = ("-nogpulib", "-nogpuinc", "-std=c++17", "-O3", "-fno-strict-aliasing")
_CLANG_WARN = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unused-const-variable")
_MARKED = ("v_dot4", "v_wmma", "v_mfma")
_AMD_FIELD = re.compile(r"^    \.(\w+): +(\S+)$", re.MULTILINE)
_PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One kernel's registers, spilled registers or bytes, and bytes of stack a thread."""

    name: str
    registers: int
    spills: int
    stack: int


@dataclass(frozen=True, slots=True)
class Report:
    """A unit's kernels and, from AMD, which of `_MARKED` instructions its assembly has."""

    kernels: list[KernelReport]
    instructions: list[str]


def _kept(package: str) -> Callable[[Callable[[str, str], Report]], Callable[[str, str], Report]]:
    """Keep what a compiler of that package reports; errors are not kept."""

    def keep(compile_source: Callable[[str, str], Report]) -> Callable[[str, str], Report]:
        @functools.wraps(compile_source)
        def report(source: str, target: str) -> Report:
            parts = (package, version(package), Path(__file__).read_text(), target, source)
            key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
            path = cache_dir() / "reports" / f"{target}-{key[:32]}.json"
            if path.is_file():
                found = json.loads(path.read_text())
                kernels = [KernelReport(**each) for each in found["kernels"]]
                return Report(kernels, found["instructions"])
            made = compile_source(source, target)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                json.dump(asdict(made), file)
            Path(file.name).replace(path)
            return made

        return report

    return keep


@_kept("ziglang")
def compile_amd(source: str, target: str) -> Report:
    """Compile, assemble and link a source; AssertionError with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        return _compile_amd(source, target, Path(folder))


def _compile_amd(source: str, target: str, folder: Path) -> Report:
    (folder / "k.hip").write_text(source)
    zig = str(Path(ziglang.__file__).parent / "zig")
    clang = [zig, "clang"]
    steps = [
        [
            *clang,
            *_CLANG_TARGET,
            *_CLANG_BARE,
            *_CLANG_WARN,
            f"--offload-arch={target}",
            "-S",
            "k.hip",
            "-o",
            "k.s",
        ],
        [*clang, "--target=amdgcn-amd-amdhsa", f"-mcpu={target}", "-c", "k.s", "-o", "k.o"],
        [zig, "ld.lld", "-shared", "k.o", "-o", "k.co"],
    ]
    for step in steps:
        done = subprocess.run(
            step, cwd=folder, capture_output=True, text=True, timeout=_STEP_S, check=False
        )
        assert done.returncode == 0, done.stderr
    assembly = (folder / "k.s").read_text()
    metadata = assembly.partition(".amdgpu_metadata")[2].partition("amdhsa.target")[0]
    kernels = re.split(r"^  - ", metadata, flags=re.MULTILINE)[1:]
    return Report(
        [_amd_kernel(dict(_AMD_FIELD.findall(text))) for text in kernels],
        [name for name in _MARKED if name in assembly],
    )


def _amd_kernel(fields: dict[str, str]) -> KernelReport:
    return KernelReport(
        fields["name"],
        int(fields["vgpr_count"]),
        int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"]),
        int(fields["private_segment_fixed_size"]),
    )


@_kept("nvidia-cuda-nvrtc")
def compile_nvidia(source: str, target: str) -> Report:
    """Compile a source to a cubin; AssertionError with the compiler's words."""
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.hip", 0, [], [])
    options = [f"--gpu-architecture={target}".encode(), b"-std=c++17", b"--ptxas-options=-v"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode()
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
    return Report(
        [
            KernelReport(name, int(registers), int(stores) + int(loads), int(stack))
            for name, stack, stores, loads, registers in _PTXAS.findall(text)
        ],
        [],
    )
