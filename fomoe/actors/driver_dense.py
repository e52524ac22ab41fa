"""All of a layer but its routed experts in the driver's own process, on the devices with those.

A layer's front leaves the experts' input and the router's scores in the arena of its device; one
message asks the device's actor for the experts' sums, which close the layer here.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric
from fomoe.actors.layer_calls import LayerCalls, Records
from fomoe.actors.layer_dense import Foresee
from fomoe.actors.layer_link import LayerLink
from fomoe.actors.layer_model import DenseHalf, open_part
from fomoe.actors.messages import Do
from fomoe.config import EngineConfig
from fomoe.engine.device_forward import Pass
from fomoe.engine.hosting import driver_options
from fomoe.engine.waterfall import Lap, Stopwatch
from fomoe.errors import DeviceError, EngineError
from fomoe.gguf.reader import GGUFFile
from fomoe.model.buffers import F32
from fomoe.model.gpu.options import HostOptions
from fomoe.model.spec import ModelSpec

I32 = npt.NDArray[np.int32]

_BOUND_S = 30.0  # of a device's work between two answers


class OwnDevices:
    """The driver's part of every device; used by one thread at a time.

    Attributes:
        models: by number of the device.
    """

    def __init__(self, models: list[DenseHalf]) -> None:
        self.models = models
        self._hidden: list[int] = []  # in each arena, as its device sees it
        self._arenas: list[npt.NDArray[np.uint8]] = []
        self._current: DenseHalf | None = None

    def share(self, fabric: Fabric, links: list[LayerLink]) -> None:
        """Pin each device's arena and hand over through it."""
        for model, link in zip(self.models, links, strict=True):
            arena, hidden = fabric.arena(link.arena), link.views.hidden.ctypes.data
            model.runtime.attach()
            shift = model.runtime.register(arena) - arena.ctypes.data
            self._arenas.append(arena)
            self._hidden.append(hidden + shift)
            places = link.views.places(shift)
            assert places is not None
            model.lend(places)

    def use(self, model: DenseHalf) -> DenseHalf:
        """Make the calling thread use a device; nothing where it does."""
        if model is not self._current:
            model.runtime.attach()
            self._current = model
        return model

    def carry(self, number: int, to: DenseHalf) -> None:
        """Take the residual stream of a device to another one, through the first one's arena.

        Its experts' sums, which lay there, have been read.
        """
        self.use(self.models[number]).take_hidden(self._hidden[number])
        self.use(to).put_hidden(self._hidden[number])

    def close(self) -> None:
        """Give the devices back."""
        for number, model in enumerate(self.models):
            model.runtime.attach()
            if number < len(self._arenas):
                model.runtime.unregister(self._arenas[number])
            model.close()
        self.models = []


class DriverDense:
    """See `Dense`; `home` is each layer's link, whose number is that of its device here.

    Charges what is computed here to the `watch`.
    """

    runs_whole = False

    def __init__(
        self, calls: LayerCalls, home: list[LayerLink], own: OwnDevices, watch: Stopwatch
    ) -> None:
        self._watch = watch
        self._calls = calls
        self._home = home
        self._own = own
        self._layers = [own.models[link.number] for link in home]
        self._under_way: int | None = None  # layer whose experts are

    def open(self, step: Pass) -> None:
        """Embed the tokens of a pass."""
        self._under_way = None
        for model in self._own.models:
            self._own.use(model)
            if step.position == 0:
                model.reset(step.state)
            model.begin(step.tokens, step.position, step.state)
        self._own.use(self._layers[0]).embed()

    def scores(self, layer: int, foresee: Foresee | None) -> F32:
        """Close the layer before, run the front; its scores [T, E] stand until the next call."""
        self._close()
        here = self._layers[layer]
        before = self._layers[layer - 1] if layer else here
        if before is not here:
            self._own.carry(self._home[layer - 1].number, here)
        self._own.use(here).front(layer)
        if foresee is not None and len(self._calls.step.tokens) == 1:
            self._hear(before, foresee)
            self._own.use(here)
        scores = here.scores(layer)
        self._watch.lap(Lap.DENSE)
        return scores

    def _hear(self, before: DenseHalf, foresee: Foresee) -> None:
        """Tell what the device that closed the layer before says of the next; it comes first."""
        self._own.use(before)
        until = time.monotonic() + _BOUND_S
        while (found := before.foreseen()) is None:
            if time.monotonic() > until:
                name = before.runtime.name
                raise DeviceError(f"{name}: a router's scores are not there after {_BOUND_S:.0f} s")
        foresee(*found)

    def ahead(self, layer: int) -> F32:
        """Return what the layer's front says of the next one's router, float32 [1, E]."""
        scores = self._layers[layer].ahead()
        assert scores is not None
        return scores

    def carry_on(self, layer: int, back: int, copies: Records) -> None:
        """Have the device's actor run the experts and give their sums."""
        link = self._home[layer]
        self._calls.send_back(link, back | Do.GIVE, layer, copies, peer=link.number)
        self._under_way = layer

    def _close(self) -> None:
        layer, self._under_way = self._under_way, None
        if layer is not None:
            self._calls.wait(self._home[layer])
            self._watch.lap(Lap.AWAIT)
            self._own.use(self._layers[layer]).close_layer(layer)

    def finish(self) -> None:
        """Close the last layer."""
        self._close()

    def run_whole(self, step: Pass) -> I32:
        """Nobody asks for it, see `runs_whole`."""
        raise EngineError(f"a whole pass of {len(step.tokens)} tokens: experts are elsewhere")

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""
        logits = self._own.use(self._layers[-1]).logits(rows.astype(np.int32))
        self._watch.lap(Lap.DENSE)
        return logits

    def largest(self, row: int) -> tuple[int, float]:
        """Return id and value of the greatest logit of a row of the last pass."""
        best, logit, _ = self._own.use(self._layers[-1]).largest(row)
        self._watch.lap(Lap.DENSE)
        return best, logit

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens."""
        for model in self._own.models:
            self._own.use(model).copy_state(to, origin, length)


def open_devices(
    file: GGUFFile, spec: ModelSpec, config: EngineConfig, *, on_devices: bool
) -> OwnDevices:
    """Open the driver's part of each device and read its dense weights.

    `on_devices` says that every expert has a slot, so that nobody has to look ahead.

    Raises:
        DeviceError: a device, its driver or its memory is not there.
    """
    models: list[DenseHalf] = []
    try:
        for number, options in enumerate(driver_options(config, spec)):
            wanted = replace(options, ahead=options.ahead and not on_devices)
            models.append(open_dense(file, spec, config.devices[number], wanted))
    except BaseException as error:
        OwnDevices(models).close()
        if isinstance(error, DeviceError):
            raise DeviceError(f"driver: {error}") from None
        raise
    return OwnDevices(models)


def open_dense(file: GGUFFile, spec: ModelSpec, device: str, options: HostOptions) -> DenseHalf:
    """Open a device and read the dense part of its layers."""
    return open_part(file, spec, device, options)
