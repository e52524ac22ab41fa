"""What actors ask of the layers of one device, or of a half of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.expert_parts import Slots
from fomoe.devices import local_name
from fomoe.gguf.reader import GGUFFile
from fomoe.model.buffers import F32
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.places import Places
from fomoe.model.spec import ModelSpec

if TYPE_CHECKING:
    from fomoe.kernels.gpu.runtime import Runtime
    from fomoe.model.gpu.host import GPUModel

I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class Half(Protocol):
    """A device's layers, or a half of them; calls queue work, those that return an array wait.

    Every wait has a bound. Addresses are of registered host memory as the device sees it; arrays
    stand until the next call.
    """

    @property
    def runtime(self) -> Runtime:
        """The device's driver."""

    def lend(self, places: Places) -> None:
        """Hand layers over to the other half through these; before any pass."""

    def begin(self, tokens: I32, position: int, state: int) -> None:
        """Begin a pass of tokens int32 [T]."""

    def take_hidden(self, address: int) -> None:
        """Write the residual stream to an address, and wait for it.

        Where the experts are alone it is their sums.
        """

    def reset(self, state: int) -> None:
        """Empty a state."""

    def close(self) -> None:
        """Give the device's memory back."""


class DenseHalf(Half, Protocol):
    """All of the layers but the routed experts."""

    def embed(self) -> None:
        """Take the tokens' embedding as the residual stream."""

    def put_hidden(self, address: int) -> None:
        """Take float32 [T, D] as the residual stream."""

    def front(self, layer: int) -> None:
        """Run a layer up to the router's scores."""

    def scores(self, layer: int) -> F32:
        """Return the scores float32 [T, E]."""

    def ahead(self) -> F32 | None:
        """Return what the next layer's router would say, float32 [1, E], with the last scores.

        None where the device does not compute it.
        """

    def foreseen(self) -> tuple[int, F32] | None:
        """Return a layer and its router's scores float32 [1, E] of the stream that goes into it.

        Once for each layer, when the device has them; None until then, and where it has none.
        """

    def close_layer(self, layer: int) -> None:
        """Close a layer with the sums of experts that another process has run."""

    def logits(self, rows: I32) -> F32:
        """Return logits float32 [n, V] of rows of the last pass."""

    def largest(self, row: int) -> tuple[int, float, float]:
        """Return id and value of a row's greatest logit (ties: the lower id), and its log sum."""

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make a state what another one is after `length` tokens."""


class LayerModel(DenseHalf, Protocol):
    """Whole layers, or their routed experts alone, of which nobody asks the verbs above."""

    @property
    def stream(self) -> int:
        """What computes; work waits for events that this stream is told to wait for."""

    @property
    def slots(self) -> Slots:
        """Where experts lie."""

    def front(self, layer: int, *, gives_input: bool = False) -> None:
        """Run a layer up to the router's scores; a token's can leave its experts' `input`."""

    def input(self) -> F32:
        """Return the experts' input float32 [1, D], with the last scores."""

    def back(self, layer: int, ids: I32, weights: F32) -> None:
        """Run the experts int32 [T, k] and close the layer.

        One token's ids ascend; they may be fewer, or none, where others are added.
        """

    def back_hits(self, layer: int, routes: tuple[I32, F32] | None, late: Bools) -> None:
        """Begin `back` of a token, `own_back` without routes, with experts that are there.

        `late` bool [K]: of the ids in ascending order, which bytes may still be on their way.
        """

    def back_late(self, layer: int) -> None:
        """Do the rest of it: all that was late is there, and published."""

    def add(self, address: int) -> None:
        """Add float32 [1, D] to a token's residual stream."""

    def own_back(self, layer: int) -> None:
        """Run the router's own choice, with the bits of a whole pass, and close the layer."""

    def begin_and_front(self, tokens: I32, position: int, state: int) -> None:
        """Run `begin` of one token, `embed` and the first layer's front as one."""

    def back_and_front(self, layer: int, routes: tuple[I32, F32] | None) -> None:
        """Run `back` of a token, `own_back` without routes, and the next layer's front as one."""

    def gather(self, layer: int) -> None:
        """Begin the experts of a prompt's chunk: the router's own choice, sorted by expert."""

    def wave(self, layer: int, experts: I32, slots: I32) -> None:
        """Run the chunk's pairs of experts int32 [n] that lie in slots int32 [n]."""

    def combine(self, layer: int) -> None:
        """Close the layer once every pair has run."""

    def prefill(self, tokens: I32, position: int, state: int) -> I32:
        """Run a whole pass by the router's own choice; returns it, int32 [L, T, k], any order."""


def open_part(
    file: GGUFFile, spec: ModelSpec, device: str, options: HostOptions, slots: tuple[int, ...] = ()
) -> GPUModel:
    """Open a device and read its part of the model; it has `slots` of each class, if any.

    Imported here: who has no GPU needs no driver of one.

    Raises:
        DeviceError: the device, its driver or its memory is not there; nothing is held then.
    """
    from fomoe.kernels.gpu.gpu import open_gpu
    from fomoe.model.gpu.host import GPUModel, planned_bytes, slots_bytes

    nbytes = planned_bytes(file, spec, options)
    if slots:
        nbytes += slots_bytes(file, spec, options, slots)
    gpu = open_gpu(local_name(device), nbytes)
    try:
        model = GPUModel(gpu, file, spec, options)
        if slots:
            model.add_slots(slots)
    except BaseException:
        gpu.close()
        raise
    return model
