"""What one device hosts of a model, and the room it works in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fomoe.errors import ConfigError
from fomoe.model.spec import ModelSpec

KV_DTYPES = ("f16", "f32")
HostPart = Literal["all", "dense", "experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """The part of a model on one device.

    Attributes:
        layers: numbers of the hosted layers, ascending.
        part: what is hosted of them: "all"; or "dense", all but the routed experts; or "experts",
            which has neither states nor ends.
        ctx_size: positions of a sequence's keys and values.
        kv_dtype: "f16" or "f32".
        int8: quantise activations to int8 per 32 values, and let prompts' attention round queries
            and weights to half; all of it float32 otherwise, which is slower.
        max_tokens: tokens of the longest pass.
        n_states: sequences whose state is held.
        embedding, head: whether the first and the last step of a pass are this device's, too.
        ahead: whether a token's front also ends with the scores of the next layer's router, and
            so do its embedding and its backs.
        arm: whether the host may compute some of a token's experts.
        late: whether some of a token's experts may be on their way when its back begins.
        graphs: replay captured launches; one by one otherwise.
        wait_s: seconds after which a wait for the device fails.
    """

    layers: tuple[int, ...]
    part: HostPart = "all"
    ctx_size: int
    kv_dtype: str = "f16"
    int8: bool = True
    max_tokens: int = 512
    n_states: int = 1
    embedding: bool = True
    head: bool = True
    ahead: bool = False
    arm: bool = False
    late: bool = False
    graphs: bool = True
    wait_s: float = 30.0

    @property
    def is_dense(self) -> bool:
        """Whether a layer's mixer, router and shared expert are here."""
        return self.part != "experts"

    @property
    def has_experts(self) -> bool:
        """Whether a layer's routed experts are here."""
        return self.part != "dense"

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError where the model has no such part."""
        outside = [layer for layer in self.layers if not 0 <= layer < spec.n_layers]
        if outside or list(self.layers) != sorted(set(self.layers)) or not self.layers:
            raise ConfigError(
                f"layers {self.layers} of a model of {spec.n_layers}: give some of "
                f"0..{spec.n_layers - 1}, ascending"
            )
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(
                f"keys and values as {self.kv_dtype!r}: a GPU keeps them as {', '.join(KV_DTYPES)}"
            )
        if self.part not in get_args(HostPart):
            raise ConfigError(
                f"part {self.part!r} of layers: one of {', '.join(get_args(HostPart))}"
            )
        for name in ("ctx_size", "max_tokens", "n_states"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
