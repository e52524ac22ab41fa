"""Ray in the tests' own process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray leaves sockets to the garbage collector when it looks for free ports."""
    for item in items:
        if "ray_cluster" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))


@pytest.fixture(autouse=True)
def collect_what_ray_left() -> Iterator[None]:
    """Collect Ray's garbage here, where its warning is expected, not in a later test."""
    yield
    gc.collect()
