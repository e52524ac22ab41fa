"""Every kernel unit with the defines that compile checks build it with.

Whoever adds a unit, or a type to one, adds a line: a few defines that stand for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fomoe.kernels.gpu.sources import FOLDER

OWN = Path(__file__).parent / "units"


@dataclass(frozen=True, slots=True)
class Check:
    """A unit as it is compiled once per target.

    `dots`: it must come to packed dot products on AMD; `tiles`: to matrix instructions.
    """

    unit: str
    defines: dict[str, int] = field(default_factory=dict)
    dots: bool = False
    tiles: bool = False
    folder: Path = FOLDER


CHECKS = (
    Check("names", dots=True, tiles=True, folder=OWN),
    Check("probe", {"SCALE": 2}, folder=OWN),
)
