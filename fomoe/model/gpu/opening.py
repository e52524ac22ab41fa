"""How a pass begins on a device: its step block and tokens, once the one before has been read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.gpu import GPU
from fomoe.model.gpu.mail import Mail
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.states import States
from fomoe.model.gpu.transfer import Signal
from fomoe.model.spec import ModelSpec

I32 = npt.NDArray[np.int32]


class Opening:
    """Writes step blocks; the next one waits until the device has read the one before."""

    def __init__(
        self, gpu: GPU, spec: ModelSpec, options: HostOptions, mail: Mail, states: States
    ) -> None:
        self._gpu, self._spec, self._options = gpu, spec, options
        self._mail, self._states = mail, states
        self._begun = Signal(gpu, options.wait_s)
        self._step_in = mail.step.bring(gpu)  # a copy would stand behind those of experts

    def write(self, count: int, token: int, position: int, state: int) -> None:
        """Fill the host's step block.

        Raises:
            DeviceError: the pass does not fit, or the vocabulary has no such token.
        """
        options = self._options
        fits = 1 <= count <= options.max_tokens and 0 <= position <= options.ctx_size - count
        if not fits:
            raise DeviceError(
                f"{count} tokens at position {position}: a pass has 1 to {options.max_tokens}, "
                f"the context {options.ctx_size}"
            )
        self._check(token)
        self._begun.wait("the pass before")
        base = self._states.base(state) if options.is_dense else 0
        self._mail.step.host[0] = (token, position, count, 0, base)

    def bring(self, tokens: I32, position: int, state: int) -> None:
        """Write the step block of a pass of int32 [T] and queue the way of both to the device.

        Raises:
            DeviceError: as `write`.
        """
        count = len(tokens)
        if count > 1:
            self._check(int(tokens.min()))
            self._check(int(tokens.max()))
        self.write(count, int(tokens[0]) if count else 0, position, state)
        if count == 1:
            self._gpu.launch(self._step_in)
        else:
            self._mail.step.send()
            self._mail.tokens.host[:count] = tokens
            self._mail.tokens.send(0, tokens.itemsize * count)
        self.mark()

    def mark(self) -> None:
        """Behind what has been queued by now the host may write the next block."""
        self._begun.mark()

    def wait(self, what: str) -> None:
        """Return when the device has come to the last mark.

        Raises:
            DeviceError: it has not within the bound.
        """
        self._begun.wait(what)

    def _check(self, token: int) -> None:
        """Refuse what would be a row beyond the embedding: the kernel does not look."""
        if self._options.embedding and not 0 <= token < self._spec.vocab:
            raise DeviceError(f"token {token}: the vocabulary has {self._spec.vocab:,}")
