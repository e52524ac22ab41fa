"""In which order experts are loaded into free slots when an engine starts."""

from __future__ import annotations

from collections.abc import Iterator

from fomoe.residency import Topology
from fomoe.types import ExpertKey


def fill_order(topology: Topology) -> Iterator[ExpertKey]:
    """Yield every expert, layer by layer in the order of the file, so that reads are sequential."""
    for layer in range(topology.n_layers):
        for expert in range(topology.n_experts):
            yield ExpertKey(layer, expert)
