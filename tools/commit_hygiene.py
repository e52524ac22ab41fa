"""Refuses files that should not be committed: too big, half merged, or with loose white space.

Run by pre-commit with the names of the staged files; prints one line per fault.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MAX_BYTES = 1_000_000
MAX_MODEL_BYTES = 32 << 20  # the bundled model travels with every checkout
CONFLICT = re.compile(rb"^(<<<<<<< |>>>>>>> )", re.MULTILINE)


def faults_of(path: Path) -> list[str]:
    """Return what is wrong with one file; text rules do not apply to binary files."""
    size = path.stat().st_size
    limit = MAX_MODEL_BYTES if path.parts[0] == "models" else MAX_BYTES
    faults = [f"{size:,} bytes, at most {limit:,} are allowed"] if size > limit else []
    content = path.read_bytes()
    if b"\0" in content:
        return faults
    if CONFLICT.search(content):
        faults.append("a merge conflict is left in it")
    lines = content.split(b"\n")
    faults += [
        f"line {number} ends with white space"
        for number, line in enumerate(lines, start=1)
        if line != line.rstrip()
    ]
    if content and (not content.endswith(b"\n") or content.endswith(b"\n\n")):
        faults.append("it does not end with one newline")
    return faults


def main(names: list[str]) -> int:
    """Check the named files; 1 where one has a fault."""
    found = [(name, fault) for name in names for fault in faults_of(Path(name))]
    for name, fault in found:
        print(f"{name}: {fault}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
