"""What one device hosts of a model, and the room it works in."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.errors import ConfigError
from fomoe.model.spec import ModelSpec

KV_DTYPES = ("f16", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """The part of a model on one device.

    Attributes:
        layers: numbers of the hosted layers, ascending.
        ctx_size: positions of a sequence's keys and values.
        kv_dtype: "f16" or "f32".
        int8: quantise activations to int8 per 32 values, and let prompts' attention round queries
            and weights to half; all of it float32 otherwise, which is slower.
        max_tokens: tokens of the longest pass.
        n_states: sequences whose state is held.
        embedding, head: whether the first and the last step of a pass are this device's, too.
        ahead: whether a token's front also ends with the scores of the next layer's router, and
            so do its embedding and its backs.
        graphs: replay captured launches; one by one otherwise.
        wait_s: seconds after which a wait for the device fails.
    """

    layers: tuple[int, ...]
    ctx_size: int
    kv_dtype: str = "f16"
    int8: bool = True
    max_tokens: int = 512
    n_states: int = 1
    embedding: bool = True
    head: bool = True
    ahead: bool = False
    graphs: bool = True
    wait_s: float = 30.0

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
        for name in ("ctx_size", "max_tokens", "n_states"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
