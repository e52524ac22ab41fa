"""Every kernel unit with the defines that compile checks build it with.

Whoever adds a unit, or a type to one, adds a line: a few defines that stand for the rest. A unit's
first line is built for every target, the others for one target per set of instructions: most
demanding first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fomoe.kernels.gpu.prompt import product_defines
from fomoe.kernels.gpu.prompt_tiles import AnyTile, FloatTile, Tile
from fomoe.kernels.gpu.sources import FOLDER, source_of

AMD = {"gfx1100": 32, "gfx1200": 32, "gfx1201": 32, "gfx942": 64}  # lanes of a wave
OWN = Path(__file__).parent / "units"


@dataclass(frozen=True, slots=True)
class Check:
    """A unit as it is compiled once per target.

    `dots`: it must come to packed dot products on AMD; `tiles`: to matrix instructions; `only`: how
    the targets begin for which anybody asks for it.
    """

    unit: str
    defines: dict[str, int] = field(default_factory=dict)
    dots: bool = False
    tiles: bool = False
    folder: Path = FOLDER
    only: str = ""


_DELTA = {"N_K": 16, "N_V": 64, "DK": 128, "DV": 128, "CONV": 4}
_ATTEND = {"HEADS": 32, "KV_HEADS": 2, "HEAD_DIM": 256, "ROPE_DIMS": 64, "THREADS": 256}

# As project() and its like make them for the shapes of the 397B model, types by type.
_WAVES = {
    "FM_WAVES": 8,
    "FM_STAGES": 2,
    "FM_TILE": 2304,
    "FM_HELD": 96,
    "FM_INT8": 1,
}
_PROJECT = {**_WAVES, "FM_ADD": 0, "FM_PARTS": 4}
_EXPERTS = {
    **_WAVES,
    "FM_HIDDEN": 4096,
    "FM_WIDTH": 1024,
    "FM_K": 10,
    "FM_PARTIAL": 0,
    "FM_STAGE_BYTES": 3392,
}
_SHARED = {"FM_SHARED_WIDTH": 1024, "FM_TYPE_SHARED": 8, "FM_PARTS": 3}
_OUT = {**_EXPERTS, **_SHARED, "FM_STAGES": 3, "FM_ROWS": 64}
_QUANTS = (6, 8, 12, 13, 14, 23)


def _project(types: tuple[int, ...], cols: int) -> dict[str, int]:
    mask, inputs = sum(1 << t for t in types), cols * 4
    sizes = {"FM_COLS": cols, "FM_INPUT_BYTES": inputs, "FM_STAGE_BYTES": 4352}
    return {**_PROJECT, **sizes, "FM_TYPES": mask}


def _tiled(types: tuple[int, int], tile: AnyTile) -> dict[str, int]:
    return {**product_defines(types, 1024, 4096, tile), "EXPERTS": 512, "PARTS": 2}


_TILE = Tile(64, 32, 128)

CHECKS = (
    Check("matmul", _tiled((12, 12), Tile(128, 64, 256)), tiles=True),
    Check("matmul", _tiled((14, 14), Tile(64, 64, 256, 1)), tiles=True),
    Check("matmul", _tiled((12, 12), Tile(128, 128, 512)), tiles=True),
    Check("matmul", _tiled((14, 14), Tile(64, 128, 256)), tiles=True),
    Check("matmul", _tiled((0, 0), FloatTile(128, 64, 256, (8, 8), 32))),
    Check("matmul", _tiled((0, 0), FloatTile(64, 32, 512, (8, 4), 128))),
    Check("matmul", _tiled((1, 1), FloatTile(16, 32, 512, (4, 4), 256))),
    Check("matmul", _tiled((14, 14), FloatTile(64, 64, 256, (8, 8), 64))),
    Check("chunk_in", {**_tiled((12, 23), _TILE), "RAGGED": 1}, tiles=True),
    Check("chunk_out", _tiled((13, 13), _TILE), tiles=True),
    Check("chunk_out", {**_tiled((14, 14), Tile(64, 64, 256, 1)), "RAGGED": 1}, tiles=True),
    Check("swiglu", _tiled((8, 6), _TILE), tiles=True),
    Check("group_pairs", {"EXPERTS": 512, "TOP_K": 10, "TILE_TOKENS": 32, "THREADS": 512}),
    Check("rows", {"THREADS": 256, "COLS": 4096, "FLOAT_ROWS": 1, "INT8": 1}),
    Check("rows", {"THREADS": 256, "HIDDEN": 4096, "TOP_K": 10, "PARTS": 3}),
    *(Check("project", _project((t,), 4096), dots=True) for t in _QUANTS),
    Check("project", {**_project((8, 12, 14), 8192), "FM_HELD": 48}, dots=True),
    Check("project", _project((0, 1), 4096)),
    Check("project", _project((30,), 4096)),
    Check("project", {**_project((0, 13), 4096), "FM_WAVES": 24, "FM_HELD": 40}, only="sm_"),
    Check("project", {**_project(_QUANTS, 2048), "FM_INT8": 0}),
    Check("experts_in", {**_EXPERTS, "FM_TYPE_IN": 12, "FM_EXPERTS": 512}, dots=True),
    Check(
        "experts_in", {**_EXPERTS, "FM_TYPE_IN": 14, "FM_EXPERTS": 0, "FM_PARTIAL": 1}, dots=True
    ),
    *(
        Check(
            "experts_in",
            {**_EXPERTS, "FM_TYPE_IN": 12, "FM_EXPERTS": experts, "FM_TURN": turn},
            dots=True,
        )
        for experts, turn in ((0, 1), (512, 1), (0, 2))
    ),
    *(Check("experts_out", {**_OUT, "FM_TYPE_DOWN": t}, dots=True) for t in (12, 14)),
    Check("experts_out", {**_OUT, "FM_TYPE_DOWN": 13, "FM_PARTIAL": 1}, dots=True),
    Check(
        "experts_out",
        {**_OUT, "FM_TYPE_DOWN": 14, "FM_WAVES": 24, "FM_STAGES": 2, "FM_HELD": 40},
        only="sm_",
    ),
    Check("delay"),
    Check("bring", {"THREADS": 256}),
    Check("names", dots=True, tiles=True, folder=OWN),
    Check("probe", {"SCALE": 2}, folder=OWN),
    Check("choose", {"EXPERTS": 512, "TOP_K": 10, "THREADS": 256}),
    *(Check("embed", {"TYPE": kind, "COLS": 4096}) for kind in (0, 1, 6, 8, 12, 13, 14, 23, 30)),
    Check("pick", {"THREADS": 512}),
    Check("delta", {**_DELTA, "PARTS": 1, "THREADS": 256}),
    Check("delta", {**_DELTA, "PARTS": 2, "THREADS": 256}),
    Check("delta_chunk", {**_DELTA, "THREADS": 256}),
    Check("attend", {**_ATTEND, "KV_F32": 0, "ROWS": 2, "SPLITS": 16, "FEW": 16, "AHEAD": 1}),
    Check("attend", {**_ATTEND, "KV_F32": 0, "ROWS": 8, "SPLITS": 66, "FEW": 33, "AHEAD": 1}),
    Check(
        "attend", {**_ATTEND, "KV_F32": 0, "ROWS": 2, "SPLITS": 8, "FEW": 8, "AHEAD": 2}, only="sm_"
    ),
    Check("attend", {**_ATTEND, "KV_F32": 1, "ROWS": 2, "SPLITS": 16, "FEW": 8, "AHEAD": 1}),
    Check("attend_inputs", {**_ATTEND, "KV_F32": 0, "TILES": 1}),
    Check("attend_tiles", {**_ATTEND, "KV_F32": 0, "THREADS": 128}, tiles=True),
    Check("attend_chunk", {**_ATTEND, "HEADS": 16, "KV_F32": 1, "ROWS": 16, "TOKENS": 2}),
)


def source(check: Check, target: str, wave: int) -> str:
    """Return what a compiler gets."""
    return source_of(check.unit, {**check.defines, "FM_WAVE": wave}, target, check.folder)
