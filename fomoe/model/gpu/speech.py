"""What routers say of a pass, on its way to the host: scores, and guesses of layers to come."""

from __future__ import annotations

from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import ExpertLayout
from fomoe.model.buffers import F32
from fomoe.model.gpu.handover import Handover
from fomoe.model.gpu.mail import Mail
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.transfer import Signal
from fomoe.model.spec import ModelSpec

_F32_BYTES = 4


class Speech:
    """Notes which programs end with a router's word, and when the device has come to it."""

    def __init__(
        self, gpu: GPU, spec: ModelSpec, options: HostOptions, mail: Mail, handover: Handover | None
    ) -> None:
        self._spec = spec
        self._ahead = options.ahead
        self._mail = mail
        self._handover = handover
        self._scored, self._spoken = Signal(gpu, options.wait_s), Signal(gpu, options.wait_s)
        self._foreseen = -1  # the layer whose router is to speak about the stream that goes into it
        self._looks_ahead = self._gives_input = False

    def end_front(
        self, layer: int, layout: ExpertLayout, tokens: int, *, gives_input: bool = False
    ) -> None:
        """A layer's front has been queued; a prompt's scores go the rest of their way.

        Where a token's gives its experts' input nobody looks ahead.
        """
        self._gives_input = gives_input
        wanted = self._ahead and not gives_input
        self._looks_ahead = wanted and tokens == 1 and layer + 1 < self._spec.n_layers
        if tokens > 1 and self._handover is not None:
            self._handover.give(layout, tokens)
        elif tokens > 1:
            self._mail.scores.fetch(0, _F32_BYTES * tokens * self._spec.moe.n_experts)
        self._scored.mark()

    def scores(self, layer: int, tokens: int) -> F32:
        """Return the scores float32 [T, E] of the layer whose front ran last; waits for them."""
        self._scored.wait(f"the router's scores of layer {layer}")
        handover = self._handover
        scores: F32 = self._mail.scores.host if handover is None else handover.scores
        return scores[:tokens]

    def ahead(self) -> F32 | None:
        """Return what the next layer's router says with those, float32 [1, E], if it does."""
        return self._mail.ahead.host if self._looks_ahead else None

    def end_stream(self, layer: int, tokens: int) -> None:
        """What was queued last ends with what the layer's router says of its stream."""
        wanted = self._ahead and not self._gives_input
        if tokens == 1 and wanted and layer < self._spec.n_layers:
            self._spoken.mark()
            self._foreseen = layer

    def foreseen(self) -> tuple[int, F32] | None:
        """Return that layer and the scores float32 [1, E], once; None until they are there."""
        if self._foreseen < 0 or not self._spoken.passed:
            return None
        layer, self._foreseen = self._foreseen, -1
        return layer, self._mail.foreseen.host
