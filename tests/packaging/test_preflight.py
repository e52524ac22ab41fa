"""Each thing that `make` needs is hidden in turn; the one apt line must name exactly it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "preflight.sh"
TOOLS = ("sh", "uname", "id", "basename")


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """A directory with the few commands that every machine has, to be the whole PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (directory / tool).symlink_to(found)
    return directory


def add_command(bin_dir: Path, name: str, body: str) -> None:
    script = bin_dir / name
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)


def add_python(
    bin_dir: Path,
    name: str = "python3",
    *,
    version: tuple[int, int] = (3, 12),
    venv: bool = True,
    header: bool = True,
) -> None:
    """Put a `python3` there that runs this interpreter and pretends to be an incomplete one."""
    lies = bin_dir / f"lies-of-{name}"
    include = lies / "include"
    include.mkdir(parents=True)
    if header:
        (include / "Python.h").touch()
    if not venv:
        (lies / "ensurepip.py").write_text("raise ImportError('hidden')\n")
    (lies / "sitecustomize.py").write_text(
        "import sys, sysconfig\n"
        f"sys.version_info = {(*version, 0, 'final', 0)!r}\n"
        f"sys.version = '{version[0]}.{version[1]}.0'\n"
        f"sysconfig.get_path = lambda name: {str(include)!r}\n"
    )
    add_command(bin_dir, name, f'PYTHONPATH="{lies}" exec "{sys.executable}" "$@"')


def add_compiler(bin_dir: Path, name: str = "g++", *, headers: bool = True) -> None:
    add_command(bin_dir, name, "exit 0" if headers else "exit 1")


def preflight(bin_dir: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(SCRIPT)],
        env={"PATH": str(bin_dir), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def apt_packages(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result
    assert result.stdout == ""
    lines = re.findall(r"^ .*apt-get install -y +(.*)$", result.stderr, flags=re.MULTILINE)
    assert len(lines) == 1, result.stderr
    return str(lines[0])


def test_a_complete_machine_passes(bin_dir: Path) -> None:
    add_python(bin_dir)
    add_compiler(bin_dir)
    result = preflight(bin_dir)
    assert (result.returncode, result.stdout, result.stderr) == (0, "python3\n", "")


@pytest.mark.parametrize(
    ("hidden", "packages"),
    [
        ({"python": True}, "python3 python3-venv python3-dev"),
        ({"venv": True}, "python3-venv"),
        ({"header": True}, "python3-dev"),
        ({"compiler": True}, "g++"),
        ({"headers": True}, "g++"),
        ({"venv": True, "header": True, "compiler": True}, "python3-venv python3-dev g++"),
        ({"python": True, "compiler": True}, "python3 python3-venv python3-dev g++"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_hidden_is_named(bin_dir: Path, hidden: dict[str, bool], packages: str) -> None:
    if "python" not in hidden:
        add_python(bin_dir, venv="venv" not in hidden, header="header" not in hidden)
    if "compiler" not in hidden:
        add_compiler(bin_dir, headers="headers" not in hidden)
    assert apt_packages(preflight(bin_dir)) == packages


@pytest.mark.parametrize("version", [(3, 9), (3, 14)])
def test_an_unknown_version_is_not_used(bin_dir: Path, version: tuple[int, int]) -> None:
    add_python(bin_dir, version=version)
    add_compiler(bin_dir)
    result = preflight(bin_dir)
    assert apt_packages(result) == "python3.13 python3.13-venv python3.13-dev"
    assert f"python3 is 3.{version[1]}" in result.stderr
    add_python(bin_dir, "python3.11")
    assert preflight(bin_dir).stdout == "python3.11\n"


def test_a_complete_python_is_preferred_to_an_incomplete_one(bin_dir: Path) -> None:
    add_python(bin_dir, header=False)
    add_python(bin_dir, "python3.12")
    add_compiler(bin_dir)
    assert preflight(bin_dir).stdout == "python3.12\n"


def test_packages_are_named_after_the_command(bin_dir: Path) -> None:
    add_python(bin_dir, "python3.12", venv=False)
    add_compiler(bin_dir)
    assert apt_packages(preflight(bin_dir)) == "python3.12-venv"


def test_the_variables_choose(bin_dir: Path) -> None:
    add_python(bin_dir)
    add_python(bin_dir, "python3.10")
    add_compiler(bin_dir)
    add_compiler(bin_dir, "my-g++")
    chosen = preflight(bin_dir, PYTHON=str(bin_dir / "python3.10"), CXX="my-g++")
    assert chosen.stdout == f"{bin_dir}/python3.10\n"
    hidden = preflight(bin_dir, PYTHON="nowhere", CXX="nothing")
    assert apt_packages(hidden) == "python3 python3-venv python3-dev g++"
    assert "PYTHON is nowhere" in hidden.stderr
    assert "CXX is nothing" in hidden.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["serve", "test"])
def test_make_stops_with_the_apt_line_before_it_makes_anything(
    bin_dir: Path, tmp_path: Path, target: str
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "tools").mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / "tools")
    for name in ("Makefile", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(SCRIPT.parents[1] / name, checkout)
    make = shutil.which("make")
    assert make is not None
    for tool in ("find", "mkdir", "touch", "rm"):
        (bin_dir / tool).symlink_to(shutil.which(tool) or tool)
    result = subprocess.run(
        [make, "-C", str(checkout), target],
        env={"PATH": str(bin_dir), "HOME": os.devnull},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode != 0
    assert "apt-get install -y python3 python3-venv python3-dev g++" in result.stderr
    assert not (checkout / ".venv").exists()
