"""Kernel sources as a compiler gets them: defines, prelude and unit in one text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fomoe.errors import DeviceError

FOLDER = Path(__file__).parent.parent / "hip"
_INCLUDE = re.compile(r'^[ \t]*#include "([^"]+)"[^\n]*$', re.MULTILINE)
_PRELUDES = {"gfx": "prelude_amd.h", "sm_": "prelude_cuda.h", "cpu": "prelude_cpu.h"}


def source_of(unit: str, defines: Mapping[str, int], target: str, folder: Path = FOLDER) -> str:
    """Return the whole source of `unit`.hip for a target, e.g. "gfx1200", "sm_90" or "cpu".

    `folder` is where the unit lies; headers come from there or from this package.

    Raises:
        DeviceError: the unit, a header of it or the target is unknown.
    """
    prelude = _PRELUDES.get(target[:3])
    if prelude is None:
        raise DeviceError(f"no kernels for target {target!r}; there are gfx*, sm_* and cpu")
    lines = [f"#define {name} {value}" for name, value in sorted(defines.items())]
    seen: set[str] = set()
    texts = [_resolved(name, folder, seen) for name in (prelude, f"{unit}.hip")]
    return "\n".join([*lines, *texts, ""])


def _resolved(name: str, folder: Path, seen: set[str]) -> str:
    """Return a file with its own headers in their places, each header once."""
    if name in seen:
        return ""
    seen.add(name)
    path = next((p for p in (folder / name, FOLDER / name) if p.is_file()), None)
    if path is None:
        raise DeviceError(f"there is no kernel source {name} in {folder}")

    text, parts, end = path.read_text(encoding="utf-8"), [f'#line 1 "{name}"\n'], 0
    for match in _INCLUDE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        parts += [text[end : match.start()], _resolved(match[1], folder, seen)]
        parts.append(f'\n#line {line} "{name}"')
        end = match.end()
    # Once is enough, and a compiler warns of the pragma in what it takes for a main file.
    return "".join([*parts, text[end:]]).replace("#pragma once\n", "\n")
