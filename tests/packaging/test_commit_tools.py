from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MESSAGE = runpy.run_path(str(ROOT / "tools" / "commit_message.py"), run_name="tool")
HYGIENE = runpy.run_path(str(ROOT / "tools" / "commit_hygiene.py"), run_name="tool")


@pytest.mark.parametrize(
    "message",
    [
        "feat(gguf): read split files",
        "fix!: refuse what was accepted\n\nBecause it was wrong.",
        "test(routing,residency): twins\n# a comment of git's",
        "Merge branch 'main'",
    ],
)
def test_a_conventional_message_passes(message: str) -> None:
    assert MESSAGE["fault_of"](message) is None


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("", "is not `type"),
        ("Fix things", "is not `type"),
        ("feat:no space", "is not `type"),
        ("feature: x", "is not `type"),
        ("feat: " + "x" * 100, "106 characters"),
        ("feat: x\nno empty line", "empty line"),
    ],
)
def test_another_message_is_refused(message: str, fault: str, tmp_path: Path) -> None:
    assert fault in MESSAGE["fault_of"](message)
    file = tmp_path / "message"
    file.write_text(message)
    tool = [sys.executable, str(ROOT / "tools" / "commit_message.py"), str(file)]
    assert subprocess.run(tool, capture_output=True, check=False).returncode == 1


def test_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()

    def faults(name: str, content: bytes) -> list[str]:
        Path(name).write_bytes(content)
        return list(HYGIENE["faults_of"](Path(name)))

    assert faults("good.txt", b"a\n\nb\n") == []
    assert faults("empty", b"") == []
    assert faults("loose.txt", b"a \nb\n") == ["line 1 ends with white space"]
    assert faults("open.txt", b"a") == ["it does not end with one newline"]
    assert faults("long.txt", b"a\n\n") == ["it does not end with one newline"]
    assert faults("merge.txt", b"<<<<<<< HEAD\n") == ["a merge conflict is left in it"]
    assert faults("big.bin", bytes(1_000_001)) == ["1,000,001 bytes, at most 1,000,000 are allowed"]
    assert faults("models/big.gguf", bytes(1_000_001)) == []
    assert HYGIENE["main"](["good.txt", "loose.txt"]) == 1
    assert HYGIENE["main"](["good.txt"]) == 0


def test_hooks_run_only_what_the_project_installs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    for hook in hooks["repos"][0]["hooks"]:
        command, *arguments = hook["entry"].split()
        assert command.startswith(".venv/bin/")
        assert all((ROOT / each).exists() for each in arguments if "/" in each)


def test_the_build_tools_are_those_of_pyproject() -> None:
    makefile = (ROOT / "Makefile").read_text()
    pyproject = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r"^BUILD_TOOLS := (.*)$", makefile, flags=re.MULTILINE)
    (required,) = re.findall(r"^requires = \[(.*)\]$", pyproject, flags=re.MULTILINE)
    assert re.findall(r"'([^']+)'", line) == re.findall(r'"([^"]+)"', required)
