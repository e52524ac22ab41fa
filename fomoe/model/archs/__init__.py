"""Registry of architectures: one module each, found by the GGUF's `general.architecture`."""

from __future__ import annotations

from fomoe.errors import GGUFError
from fomoe.gguf.reader import GGUFFile
from fomoe.model.archs import qwen35moe
from fomoe.model.spec import ModelSpec

_ARCHITECTURES = {qwen35moe.NAME: qwen35moe.read_spec}


def read_spec(file: GGUFFile) -> ModelSpec:
    """Return the specification of the model in `file`; GGUFError where it is not supported."""
    name = file.metadata.str("general.architecture")
    reader = _ARCHITECTURES.get(name)
    if reader is None:
        raise GGUFError(
            file.path, "general.architecture", 0,
            f"architecture {name!r} is not supported",
            f"fomoe runs {', '.join(sorted(_ARCHITECTURES))}",
        )  # fmt: skip
    return reader(file)
