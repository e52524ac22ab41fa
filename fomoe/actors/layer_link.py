"""The driver's ends of a device that hosts layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from fomoe.actors.channel import Receiver, Sender
from fomoe.actors.layer_layout import LayerArena, LayerViews
from fomoe.engine.placed import Picks


class OpenStep(NamedTuple):
    """A step whose copies and slots are the device's until it has answered.

    `is_last` says that the layer is done with it; otherwise more of its experts are to come.
    """

    id: int
    layer: int
    is_last: bool


@dataclass(slots=True)
class LayerLink:
    """The driver's ends of one device: its rings, its arena, and what it has to answer.

    Attributes:
        sent, answered: the last step that it was sent and that it answered.
        begun: the pass that it knows of.
        open: the step that the planner waits for.
        given_up: steps that it did not carry out, of those answered last.
        picks: where a token's experts int32 [k] and weights float32 [k] go.
    """

    name: str
    number: int
    node: int
    arena: str
    layout: LayerArena
    views: LayerViews
    sender: Sender
    receiver: Receiver
    sent: int = 0
    answered: int = 0
    begun: int = 0
    open: OpenStep | None = None
    given_up: set[int] = field(default_factory=set)
    picks: Picks = field(init=False)

    def __post_init__(self) -> None:
        self.picks = self.views.ids[0], self.views.weights[0]
