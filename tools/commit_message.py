"""Refuses a commit message that does not follow Conventional Commits 1.0.

Run by pre-commit at the `commit-msg` stage with the file that holds the message.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TYPES = (
    "build",
    "chore",
    "ci",
    "docs",
    "feat",
    "fix",
    "perf",
    "refactor",
    "revert",
    "style",
    "test",
)
SUBJECT = re.compile(rf"({'|'.join(TYPES)})(\([\w,./-]+\))?!?: \S.*")
MAX_SUBJECT = 100


def fault_of(message: str) -> str | None:
    """Return what is wrong with a message, None where nothing is."""
    subject, *rest = message.splitlines() or [""]
    if subject.startswith(("Merge ", "fixup! ", "squash! ")):
        return None
    if SUBJECT.fullmatch(subject) is None:
        return f"{subject!r} is not `type(scope): what changed`; types: {', '.join(TYPES)}"
    if len(subject) > MAX_SUBJECT:
        return f"the subject has {len(subject)} characters, at most {MAX_SUBJECT} are allowed"
    if rest and rest[0].strip() and not rest[0].startswith("#"):
        return "an empty line must follow the subject"
    return None


if __name__ == "__main__":
    FAULT = fault_of(Path(sys.argv[1]).read_text())
    sys.exit(FAULT)
