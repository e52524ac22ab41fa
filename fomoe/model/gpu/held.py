"""What a device holds of a model."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.model.gpu.handover import Handover
from fomoe.model.gpu.slots import ExpertSlots
from fomoe.model.gpu.states import States
from fomoe.model.gpu.weights import EndMatrices, LayerMatrices, RouterMatrices


@dataclass(frozen=True, slots=True)
class Held:
    """What a device holds, as the builders of passes want it.

    Attributes:
        layers: the dense part of each layer; empty where the device has experts alone.
        ahead: next layers' routers, by the layer before; the first layer's own, where it is here,
            stands at -1.
        handover: to the process with the other half of each layer; None where all is here.
        arm: whether the host may compute some of a token's experts.
        late: whether some may be on their way when a token's back begins.
    """

    layers: dict[int, LayerMatrices]
    ends: EndMatrices
    states: States
    slots: ExpertSlots
    ahead: dict[int, RouterMatrices]
    handover: Handover | None
    arm: bool = False
    late: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether the routed experts are here."""
        return self.handover is None or not self.layers
