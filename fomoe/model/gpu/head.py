"""The ends of a pass: tokens to the residual stream, rows of it to logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.kernels.gpu import prompt
from fomoe.kernels.gpu.picking import LARGEST, embed, embed_rows, largest
from fomoe.kernels.gpu.products import Options, project
from fomoe.kernels.gpu.prompt import Chunk, Norm
from fomoe.kernels.gpu.step import STEP
from fomoe.model.buffers import F32
from fomoe.model.gpu.decode import Desk
from fomoe.model.gpu.program import Step
from fomoe.model.gpu.transfer import Mirror
from fomoe.model.gpu.weights import EndMatrices
from fomoe.model.gpu.work import form
from fomoe.model.layers import HEAD_ROWS

I32 = npt.NDArray[np.int32]

_F32 = 4


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decode step by the device's own choice came to.

    Attributes:
        token: the id of the largest logit (ties: the lower id).
        logit: its logit.
        log_sum: logarithm of the sum of all logits' exponentials.
        ids: int32 [L, K], each layer's experts, ascending.
        weights: float32 [L, K], in the order of `ids`.
    """

    token: int
    logit: float
    log_sum: float
    ids: I32
    weights: F32


@dataclass(frozen=True, slots=True)
class HeadMail:
    """What the head brings to the host, and its own step block.

    Attributes:
        result: LARGEST [1].
        logits: float32 [HEAD_ROWS, V].
        step: STEP [1], of which `tokens` counts.
    """

    result: Mirror
    logits: Mirror
    step: Mirror

    @classmethod
    def of(cls, desk: Desk) -> HeadMail:
        """Take the memory on both sides."""
        logits = Mirror(desk.gpu, (HEAD_ROWS, desk.spec.vocab), np.float32, desk.work.logits)
        return cls(Mirror(desk.gpu, (1,), LARGEST), logits, Mirror(desk.gpu, (1,), STEP))


class Head:
    """Logits of rows of the residual stream; one row as a decode step computes it."""

    def __init__(self, desk: Desk, ends: EndMatrices, mail: HeadMail) -> None:
        self._desk = desk
        self._ends = ends
        self._mail = mail
        self._found = mail.result.host[:1]
        self._one = self._steps(desk.work.head_x)
        self._many = self._rows_steps() if desk.tokens > 1 else []

    def token_steps(self) -> list[Step]:
        """Return the steps of a decode step: logits of the first row, the largest, its copy."""
        return [*self._steps(self._desk.work.x), Step("copy", self._mail.result.fetch)]

    def _steps(self, x: int) -> list[Step]:
        desk, ends = self._desk, self._ends
        gpu, spec, logits = desk.gpu, desk.spec, desk.work.logits
        assert ends.head is not None
        options = Options(int8=desk.int8)
        product = project(gpu, x, ends.norm, spec.eps, [(ends.head, logits)], options=options)
        peak = largest(gpu, logits, spec.vocab, self._mail.result.address)
        return [Step("head", product), Step("largest", peak)]

    def run(self, rows: Sequence[int]) -> None:
        """Queue the logits of some rows of the residual stream.

        Raises:
            DeviceError: there are more than HEAD_ROWS of them, or than one where passes have one.
        """
        most = HEAD_ROWS if self._many else 1
        if not 1 <= len(rows) <= most:
            raise DeviceError(f"logits of {len(rows)} rows: ask for 1 to {most} at a time")
        gpu, work = self._desk.gpu, self._desk.work
        nbytes = _F32 * self._desk.spec.hidden
        for i, row in enumerate(rows):
            gpu.runtime.copy(
                work.head_x + i * nbytes, work.x + int(row) * nbytes, nbytes, gpu.stream
            )
        if len(rows) > 1:
            self._mail.step.host["tokens"] = len(rows)
            self._mail.step.send()
        for step in self._many if len(rows) > 1 else self._one:
            step.queue(gpu)
        if len(rows) == 1:
            self._mail.result.fetch()

    def _rows_steps(self) -> list[Step]:
        desk, ends, work = self._desk, self._ends, self._desk.work
        assert ends.head is not None
        chunk = Chunk(self._mail.step.address, HEAD_ROWS, desk.int8)
        rows = form(work.head_h, ends.head.type, int8=desk.int8)
        norm = Norm(ends.norm, desk.spec.hidden, desk.spec.eps)
        return [
            Step("norm", prompt.norm_rows(desk.gpu, chunk, work.head_x, norm, rows)),
            Step("head", prompt.matmul(desk.gpu, chunk, rows, ends.head, work.logits)),
        ]

    def fetch(self, rows: int) -> F32:
        """Queue the copy of the first rows' logits; returns where they come to, float32 [n, V]."""
        self._mail.logits.fetch(0, rows * _F32 * self._desk.spec.vocab)
        logits: F32 = self._mail.logits.host[:rows]
        return logits

    def largest(self) -> tuple[int, float, float]:
        """Return id, logit and log sum of the last row's largest logit, whose copy has come."""
        token, logit, log_sum = self._found.item()
        return token, logit, log_sum


def embed_steps(desk: Desk, ends: EndMatrices, ids: int) -> tuple[list[Step], list[Step]]:
    """Return the embedding of the step block's token, and that of T ids int32 at an address."""
    if ends.embedding is None:
        return [], []
    gpu, x = desk.gpu, desk.work.x
    one = Step("embed", embed(gpu, desk.step, ends.embedding, x))
    many = Step("embed", embed_rows(gpu, desk.step, ends.embedding, (ids, desk.tokens), x))
    return [one], [many]
