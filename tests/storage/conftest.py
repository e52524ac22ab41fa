from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from expert_files import Model, write_model
from fetch_bench import Bench

from fomoe.storage.segment import Segment


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return write_model(tmp_path)


@pytest.fixture
def segment(model: Model) -> Iterator[Segment]:
    """Room for 16 slots of the larger size class."""
    with Segment.create(16 * model.slot_bytes) as segment:
        yield segment


@pytest.fixture
def bench(model: Model, segment: Segment) -> Bench:
    return Bench(model, segment)
