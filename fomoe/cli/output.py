"""Files that verbs write: what cannot be written is refused, before the work where possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fomoe.errors import ConfigError


def check_output(path: Path, option: str = "--output") -> None:
    """Refuse a file before anything is done for it.

    Raises:
        ConfigError: its folder is not there, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no directory; make it or choose another {option}")
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; name a file in it: {option} FILE")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of writing into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
