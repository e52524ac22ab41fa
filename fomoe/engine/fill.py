"""In which order experts are loaded into free slots when an engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.residency import Topology, parse_profile
from fomoe.types import ExpertKey

# A profile counts as much as so many tokens of what will be asked.
PROFILE_TOKENS = 100

Frequencies = npt.NDArray[np.float32]


def fill_order(topology: Topology, frequencies: Frequencies | None = None) -> Iterator[ExpertKey]:
    """Yield every expert, layer by layer.

    With frequencies float32 [L, E] the most frequent come first, so that they come onto the
    device and the next ones into RAM; without, in the order of the file, so that reads are
    sequential.
    """
    for layer in range(topology.n_layers):
        order = range(topology.n_experts)
        if frequencies is not None:
            order = np.argsort(-frequencies[layer], kind="stable").tolist()
        for expert in order:
            yield ExpertKey(layer, expert)


def read_profile(path: Path, n_layers: int, n_experts: int) -> Frequencies:
    """Return the frequencies of a profile's file, float32 [L, E].

    Raises:
        ConfigError: it cannot be read, is no profile, or is one of another model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror}") from None
    try:
        return parse_profile(data, n_layers, n_experts)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
