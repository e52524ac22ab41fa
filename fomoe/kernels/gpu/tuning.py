"""Numbers that make products fast on a kind of device; none of them changes what is computed.

They may change the order in which a row is summed, so bits are those of one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.kernels.gpu.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a product's groups are made.

    Attributes:
        waves: waves of a group.
        per_core: groups for each core.
        stages: tiles of weights in a wave's ring; all but one are on their way.
        tile: bytes of a tile at most, where a row is longer.
        held: 4-byte words of activations that a lane may keep in registers.
        early: start beside the launch before, with weights that nobody writes.
    """

    waves: int = 8
    per_core: int = 1
    stages: int = 3
    tile: int = 2304
    held: int = 96
    early: bool = False

    def defines(self, stage_bytes: int) -> dict[str, int]:
        """What the kernels' sources call these numbers."""
        return {
            "FM_WAVES": self.waves,
            "FM_STAGES": self.stages,
            "FM_TILE": self.tile,
            "FM_HELD": self.held,
            "FM_STAGE_BYTES": stage_bytes,
        }


Kernel = Literal["project", "project_rows", "experts_in", "experts_out"]

# By the first letters of a target. NVIDIA's copies into shared memory cost no registers and bypass
# L1, so that a few waves with deep rings fill the bus; AMD's cards should need waves for that.
# Lines of "sm_7" and "gfx" are guesses: nobody has measured them. "cpu" is for tests.
_TUNINGS = {
    "sm_": Tuning(waves=16, per_core=1, stages=3, tile=2304, held=96, early=True),
    "sm_7": Tuning(waves=8, per_core=1, stages=2, tile=2304, held=48),
    "gfx9": Tuning(waves=4, per_core=4, stages=2, tile=4608, held=48),
    "gfx1": Tuning(waves=8, per_core=2, stages=2, tile=2304, held=48),
    "cpu": Tuning(waves=2, per_core=1, stages=3, tile=2304, held=96),
}


_RESERVED_BYTES = 1024  # of shared memory for each group, beside its own

_SM = _TUNINGS["sm_"]
_FEW_LARGE = replace(_SM, stages=2, tile=4608)
_SMALL = replace(_SM, stages=4, tile=1280)
_DEEP = replace(_SM, stages=4)
_IN_PAIRS = replace(_SM, per_core=2, stages=2)
# More waves than 20 leave too few registers for a row's 8,192 activations: they are not held.
_MANY_WAVES = replace(_SM, waves=24, stages=2, held=40)

# What was measured for a kernel and the type of most of its weights, where it is not the above:
# `benchmarks/gpu/products.py --tune` on an NVIDIA H200. Where a type is a layer's, whole layers
# decide; else 600 MB of it do, for both dense kernels.
_MEASURED: Mapping[str, Mapping[tuple[Kernel, GGMLType], Tuning]] = {
    "sm_": {
        ("project", GGMLType.Q4_K): _IN_PAIRS,
        ("project", GGMLType.Q5_K): _MANY_WAVES,
        ("project", GGMLType.Q6_K): _DEEP,
        ("project", GGMLType.Q8_0): _SMALL,
        ("project", GGMLType.IQ4_XS): _FEW_LARGE,
        ("project_rows", GGMLType.Q4_K): _DEEP,
        ("project_rows", GGMLType.Q5_K): _MANY_WAVES,
        ("project_rows", GGMLType.Q6_K): _DEEP,
        ("project_rows", GGMLType.Q8_0): _SMALL,
        ("project_rows", GGMLType.IQ4_XS): _FEW_LARGE,
        ("experts_in", GGMLType.Q4_K): _DEEP,
        ("experts_out", GGMLType.Q5_K): _DEEP,
        ("experts_out", GGMLType.Q6_K): _MANY_WAVES,
    }
}


def tuning_of(runtime: Runtime, kernel: Kernel, qtype: int) -> Tuning:
    """Return the tables' line for a device, a kernel and the type of most of its weights."""
    start = _line_of(runtime)
    return _MEASURED.get(start, {}).get((kernel, GGMLType(qtype)), _TUNINGS[start])


def _line_of(runtime: Runtime) -> str:
    for start in sorted(_TUNINGS, key=len, reverse=True):
        if runtime.target.startswith(start):
            return start
    raise DeviceError(f"{runtime.name}: no kernels for target {runtime.target!r}")


def fit(tuning: Tuning, runtime: Runtime, input_bytes: int, stage_bytes: int) -> Tuning:
    """Return the tuning with as many waves of a group as the device has shared memory for.

    Of groups that start early, a core gets no more than it has room for at a time.

    Raises:
        DeviceError: not even one wave fits.
    """
    room = runtime.shared_bytes - input_bytes
    waves = min(tuning.waves, room // (tuning.stages * stage_bytes))
    if waves < 1:
        raise DeviceError(
            f"{runtime.name}: a product wants {input_bytes + tuning.stages * stage_bytes:,} bytes "
            f"of shared memory, {runtime.shared_bytes:,} are there; use cpu devices for this model"
        )
    if waves < tuning.waves:
        waves = 1 << (waves.bit_length() - 1)
    group = input_bytes + waves * tuning.stages * stage_bytes + _RESERVED_BYTES
    most = (runtime.shared_bytes + _RESERVED_BYTES) // group if tuning.early else tuning.per_core
    return replace(tuning, waves=waves, per_core=min(tuning.per_core, most))


def group_bytes(tuning: Tuning, runtime: Runtime, shared_bytes: int) -> int:
    """Return shared memory for a group so that a core has no room for more than `per_core`.

    A launch that starts early finds most cores taken: where several of its groups fit into one,
    they gather on the cores that are free first, and the others wait for these in the end.
    """
    if not tuning.early:
        return shared_bytes
    core_bytes = runtime.shared_bytes + _RESERVED_BYTES
    least = core_bytes // (tuning.per_core + 1) - _RESERVED_BYTES
    return max(shared_bytes, (least // 16 + 1) * 16)


@dataclass(frozen=True, slots=True)
class RowShape:
    """How a wave covers rows of `cols` values; the twin of RowTiles in hip/tiles.h."""

    qtype: GGMLType
    cols: int
    int8: bool

    @property
    def is_int8(self) -> bool:
        """Whether activations are int8."""
        return self.int8 and not self.qtype.is_float

    def rows(self, wave: int, tile: int) -> int:
        """Rows of a tile."""
        lanes = min(wave, 1 << (self.cols // self._piece - 1).bit_length())
        side = wave // lanes
        if self._segment_bytes(wave, tile) < self._row_bytes:
            return side
        return side * max(1, min(4, tile // (side * self._row_bytes)))

    def stage_bytes(self, wave: int, tile: int) -> int:
        """Shared memory for one tile, with margins for its alignment."""
        most = self.rows(wave, tile) * min(self._row_bytes, self._segment_bytes(wave, tile))
        return -(-(most + 32) // 16) * 16

    @property
    def _row_bytes(self) -> int:
        return row_bytes(self.qtype, self.cols)

    def _segment_bytes(self, wave: int, tile: int) -> int:
        """Bytes of a row in a tile at most, if the row has more than a piece for each lane."""
        step = wave * self._piece * self.qtype.block_bytes // self.qtype.block_elements
        return max(step, tile // step * step)

    @property
    def input_bytes(self) -> int:
        """Shared memory for a vector of activations."""
        return self.cols + -(-self.cols // 64) * 16 if self.is_int8 else 4 * self.cols

    @property
    def _piece(self) -> int:
        """Values that a lane takes at a time."""
        if self.qtype.is_float:
            return 16 // self.qtype.block_bytes
        return 64 if self.is_int8 and self.qtype.block_elements == 256 else 32
