"""Waves of a prompt's sweep on a GPU: reads, loads and entries.

A sweep demotes nothing: what it drops from VRAM is nowhere, and what lies in RAM stays there. See
`fomoe.engine.copies` for how a device executes waves, `fomoe.residency.sweep` for what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.engine.copies import COPY
from fomoe.engine.gpu_segment import GpuSegment
from fomoe.engine.transfers import ENTRY, Read
from fomoe.residency import Guess, Residency, Sweep, Wave
from fomoe.types import ExpertKey, Tier


@dataclass(frozen=True, slots=True, eq=False)
class WaveOrders:
    """What a wave asks for.

    Attributes:
        reads: as demand.
        copies: records of `COPY`, to be passed to `GpuSegment.end_all` when the wave is answered.
        entries: records of `ENTRY`, ascending by expert.
    """

    reads: list[Read]
    copies: npt.NDArray[np.void]
    entries: npt.NDArray[np.void]


def order_again(segment: GpuSegment, sweep: Sweep) -> list[Read]:
    """Return the reads, as demand, of experts that the sweep wants and that were guessed at.

    To be sent before anything else happens: reads that storage reports as dropped are forgotten.
    """
    resident = sweep.experts[sweep.sources != Tier.NVME].tolist()
    again = (segment.demand(ExpertKey(sweep.layer, expert)) for expert in resident)
    return [read for read in again if read is not None]


def order_wave(segment: GpuSegment, residency: Residency, sweep: Sweep, wave: Wave) -> WaveOrders:
    """Carry out a wave in the segment's accounts: the dropped lose their slots, the rest is loaded.

    `Sweep.next_wave` may read `segment.read_room` experts.
    """
    cancels = [segment.drop(key) for key in wave.dropped]
    reads = [segment.read(place.key, ahead=False) for place in wave.placed]
    # Where one of them was before, its bytes may lie there still: that counts for nothing.
    placed = {place.key.expert: place.slot for place in (*wave.placed, *wave.borrowed)}
    loads, entries = [], []
    for expert in sweep.experts[wave.first : wave.end].tolist():
        key = ExpertKey(sweep.layer, expert)
        vram = placed.get(expert, residency.device_slot(key))
        if expert in placed or not segment.is_in_vram(key, residency):
            loads.append(segment.load(key, vram, ahead=False))
            entries.append((*loads[-1][:2], vram, expert))
        else:
            entries.append((0, 0, vram, expert))
    copies = np.concatenate([*cancels, np.array(loads, COPY)])
    return WaveOrders(reads, copies, np.array(entries, ENTRY))


def order_guess(
    segment: GpuSegment, residency: Residency, guess: Guess
) -> tuple[list[Read], npt.NDArray[np.void]]:
    """Return the reads, as prefetches, and the ahead list of a sweep's guess.

    The guess may have `segment.guess_room` experts.
    """
    cancels = [segment.drop(key) for key in guess.dropped]
    reads, loads, rest = segment.bring(guess.placed, residency, ahead=True)
    assert not rest, "a guess beyond guess_room"
    return reads, np.concatenate([*cancels, loads])
