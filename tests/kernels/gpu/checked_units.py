"""Every kernel unit with the defines that compile checks build it with.

Whoever adds a unit, or a type to one, adds a line: a few defines that stand for the rest. A unit's
first line is built for every target, the others for one target per set of instructions: most
demanding first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fomoe.kernels.gpu.sources import FOLDER, source_of

AMD = {"gfx1100": 32, "gfx1200": 32, "gfx1201": 32, "gfx942": 64}  # lanes of a wave
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
    Check("delay"),
    Check("names", dots=True, tiles=True, folder=OWN),
    Check("probe", {"SCALE": 2}, folder=OWN),
)


def source(check: Check, target: str, wave: int) -> str:
    """Return what a compiler gets."""
    return source_of(check.unit, {**check.defines, "FM_WAVE": wave}, target, check.folder)
