"""What the two halves of a layer hand to each other where two processes have them on one device.

The dense half leaves the experts' input and the router's scores in host memory that both devices'
drivers have pinned, the experts' half the sum of its experts. One token's go by kernels, past
copies of experts that are under way; a prompt's are copied.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import ExpertLayout
from fomoe.model.buffers import F32
from fomoe.model.gpu.places import Places
from fomoe.model.gpu.program import Step
from fomoe.model.gpu.transfer import Carrier
from fomoe.model.gpu.work import Work


class _Piece(NamedTuple):
    """An array on its way: on the device, on the host, and the bytes of a token."""

    device: int
    host: int
    nbytes: int


class Handover:
    """Copies between a device's work memory and `Places`, which are lent once, before any pass."""

    def __init__(self, gpu: GPU, work: Work, *, int8: bool) -> None:
        self._work = work
        self._int8 = int8
        self._places: Places | None = None
        self._carrier = Carrier(gpu)

    def lend(self, places: Places) -> None:
        """Use these from the first pass on: captured launches keep their addresses."""
        self._places = places

    @property
    def scores(self) -> F32:
        """Where the scores come to, float32 [T, E]."""
        return self._lent.scores

    @property
    def _lent(self) -> Places:
        assert self._places is not None
        return self._places

    def given(self, layout: ExpertLayout) -> Step:
        """Return what brings one token's input and scores to the host."""
        return Step("input", partial(self.give, layout, 1))

    def taken(self, layout: ExpertLayout) -> Step:
        """Return what brings them onto the device."""
        return Step("input", partial(self.take, layout, 1))

    def sums_step(self) -> Step:
        """Return what brings one token's sum of experts to the device."""
        return Step("sums", partial(self.take_sums, 1))

    def give(self, layout: ExpertLayout, tokens: int) -> None:
        """Queue the way of T rows of input, as experts of the layout want it, and of scores."""
        for piece in self._inputs(layout):
            self._move(piece, tokens, to_host=True)

    def take(self, layout: ExpertLayout, tokens: int) -> None:
        """Queue their way onto the device."""
        for piece in self._inputs(layout):
            self._move(piece, tokens, to_host=False)

    def take_sums(self, tokens: int) -> None:
        """Queue the way of T sums onto the device."""
        self._move(_piece(self._work.sums, self._lent.sums), tokens, to_host=False)

    def _inputs(self, layout: ExpertLayout) -> list[_Piece]:
        """Return the forms that kernels of a token and of a prompt take, and the scores."""
        places, h = self._lent, self._work.moe.h
        floats = [GGMLType(qtype).is_float for qtype in layout.types]
        pieces = [_piece(self._work.moe.scores, places.scores)]
        if any(floats) or not self._int8:
            pieces.append(_piece(h.x, places.x))
        if self._int8 and not floats[0]:
            pieces += [_piece(h.q, places.q), _piece(h.s, places.s)]
        return pieces

    def _move(self, piece: _Piece, tokens: int, *, to_host: bool) -> None:
        to, source = piece.device, piece.host + self._lent.shift
        if to_host:
            to, source = source, to
        self._carrier.carry(to, source, piece.nbytes, tokens)


def _piece(device: int, array: npt.NDArray[np.generic]) -> _Piece:
    return _Piece(device, array.ctypes.data, array[0].nbytes)
