"""Copies between a node's segment and the slots of its GPUs: what is ordered, and in what order.

An expert comes from the file into a slot of the segment (storage, `READ`), from there into a slot
of its GPU (`LOAD`), and back into the segment when it makes room and the RAM tier wants it
(`DEMOTE`). The planner writes `COPY` records; the actor of the GPU executes them. This page is what
both sides rely on; `tests/support/simulated_gpu.py` executes it and checks every byte.

Addresses. A record names `slot` of the segment (`address` is its first byte, relative to the first
slot) and `vram`, a slot of the GPU's pool of the layer's size class. Parts of an expert lie in the
segment as `ExpertTable.part_offsets` says and in a VRAM slot as the kernels want them: a copy moves
the three parts, in either direction, and touches no other byte.

Two lists reach a device.

- The *step's*: `WavePlanner.step_copies`, with the STEP or SWEEP message whose entries they serve.
  Its DONE answers for all of them at once; they need no answer of their own.
- The *ahead* list: `WavePlanner.ahead_copies`, in a message of their own. It belongs to no step.
  Each of its records is answered once, by sending the record back with `outcome` set, in any order,
  at the latest when the device has nothing else to do.

What the device does with a record.

- DEMOTE begins when the device hears of it and waits for nothing: the bytes are in VRAM by what was
  answered or stands before it in the stream. When they are in the segment the device stores
  `generation` into the slot's landed word (release), as storage does after a read. It is carried
  out whatever becomes of its step.
- LOAD waits until the landed word of `slot` has reached `generation` (acquire), then begins. LOADs
  begin as they land, those of steps before those of ahead lists. A step's LOAD with the `vram`,
  `slot` and `generation` of an ahead LOAD that has begun, or ended, waits for that one and copies
  nothing, or the same bytes again. If that one has not begun, the step's takes its place (it is
  DROPPED).
- A LOAD or DEMOTE takes effect after the copies of earlier records on the same `vram`: demotions
  stand before the loads that overwrite their slots. A LOAD of another expert into the `vram` of an
  ahead LOAD that has not begun takes its place (DROPPED); one that has begun ends first.
- CANCEL, in either list, names ahead LOADs by `slot` and `generation`: nobody wants them any more,
  and their bytes may never land. They are DROPPED unless they have begun. It has no answer.
- Nothing else is ever dropped.

Entries of a step on a GPU: `slot` is the VRAM slot. `generation` 0 says that the bytes are there;
otherwise the step's LOAD into that slot brings them. One with a negative `slot` is computed in RAM
by storage's kernels (`fomoe.actors.layer_arm`): `~slot` is the slot of the segment, `address` and
`generation` say where and when, as on a `cpu` device. Steps in parts have none. A GPU reads a VRAM
slot between STEP and DONE only.

What may run at the same time: copies in both directions, the compute of what is there, and reads of
storage. Only the rules above order them. Nothing a device waits for waits for the driver: a LOAD
for storage alone, compute for its LOADs and for what storage computes.

DONE with `aborted` 0: every record of the step has ended, every entry is computed. With `aborted`
set (the driver sent ABORT because a read failed): the DEMOTEs have ended, every LOAD has ended or
will never begin, and no VRAM slot of the step is read any more. A device has one step at a time;
the driver plans the next layer's on another device without waiting for the answer, unless
`WavePlanner.is_tight`, and gives up what a failed pass has left under way before the next begins.

Which answer frees what. A slot of the segment is free when the RAM tier does not hold its expert,
the expert's VRAM slot has its bytes, and every record that names it is answered: `GpuSegment`
counts those. The planner never gives a VRAM slot away between STEP and DONE, and a slot of the
segment never while a record names it, nor to a DEMOTE while storage may be writing to it.

The driver's calls of `WavePlanner`: a step's reads go to storage, `step_copies` with the step,
`ahead_copies` beside it. DONE goes to `answered`, then the residency releases the layer; records
sent back go to `ended`. A read that failed or was dropped goes to `forget`, and what
`take_cancelled` then returns to the device; where a step waits for it, ABORT does as well, also
where the next layer has begun on another device.

Prompts. A sweep's waves come in ascending expert id and end in that order. The device adds each
wave to the result [T, D] of the chunk, expert after expert ascending, by float32 fma: the first
wave (STEP_FIRST) begins with zeros, and the bits do not depend on where waves end. Loads of later
waves may begin while an earlier one computes. Answers of decode steps are added at the end instead
(STEP_LAST), ascending as well, from one row per pair: their entries come by tier, not by id.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

COPY = np.dtype(
    [
        ("address", "<i8"),
        ("generation", "<u8"),
        ("ticket", "<u8"),  # the driver's own; sent back as it is
        ("nbytes", "<i8"),  # of the expert, for accounts of the link
        ("kind", "<i4"),
        ("layer", "<i4"),
        ("expert", "<i4"),
        ("vram", "<i4"),
        ("slot", "<i4"),
        ("outcome", "<i4"),
    ]
)


class CopyKind(IntEnum):
    """What a `COPY` record asks for."""

    DEMOTE = 0
    LOAD = 1
    CANCEL = 2
    COMPUTE = 3  # never sent: a use of a slot by storage's kernels


class Outcome(IntEnum):
    """How a record ended."""

    OPEN = 0
    DONE = 1
    DROPPED = 2
