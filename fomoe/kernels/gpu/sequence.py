"""Kernels that look along a sequence, and those at its ends, for decode and for prompts."""

from __future__ import annotations

from fomoe.kernels.gpu.attention import (
    AttendCall,
    AttendInputs,
    AttendPlan,
    AttendWeights,
    attend,
    attend_chunk,
    attend_scratch_bytes,
    rope_turns,
)
from fomoe.kernels.gpu.delta import (
    DeltaCall,
    DeltaInputs,
    DeltaWeights,
    delta,
    delta_chunk,
    delta_scratch_bytes,
)
from fomoe.kernels.gpu.picking import LARGEST, choose_rows, embed, embed_rows, largest
from fomoe.kernels.gpu.state import DeltaPlace, KVPlace, StateLayout

__all__ = [
    "LARGEST",
    "AttendCall",
    "AttendInputs",
    "AttendPlan",
    "AttendWeights",
    "DeltaCall",
    "DeltaInputs",
    "DeltaPlace",
    "DeltaWeights",
    "KVPlace",
    "StateLayout",
    "attend",
    "attend_chunk",
    "attend_scratch_bytes",
    "choose_rows",
    "delta",
    "delta_chunk",
    "delta_scratch_bytes",
    "embed",
    "embed_rows",
    "largest",
    "rope_turns",
]
