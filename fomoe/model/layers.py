"""The dense part of a model on the host that runs attention: embedding, layers, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.gguf.reader import GGUFFile
from fomoe.kernels.cpu import ops
from fomoe.model.attention import AttentionLayer, AttentionWeights
from fomoe.model.buffers import F32, Activations, Buffer
from fomoe.model.deltanet import DeltaLayer, DeltaWeights
from fomoe.model.embedding import Embedding, StoredEmbedding
from fomoe.model.linear import Linear, Weights
from fomoe.model.moe import MoEBlock, MoEWeights
from fomoe.model.spec import ModelSpec
from fomoe.model.state import Batch

HEAD_ROWS = 16  # rows of logits held at a time: a 248k vocabulary costs 1 MB a row


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Dense weights of one layer."""

    mixer: AttentionWeights | DeltaWeights
    moe: MoEWeights


class DenseModel:
    """Everything but the routed experts; the layer loop calls these verbs in order.

    Buffers are sized for `max_tokens` at once and handed out as views that the next call of the
    same verb overwrites. `stored_embedding` leaves an embedding that is not the head in the file.
    """

    def __init__(self, file: GGUFFile, spec: ModelSpec, max_tokens: int, *, int8: bool,
                 stored_embedding: bool = False,
                 on_layer: Callable[[int], None] | None = None) -> None:  # fmt: skip
        self.spec = spec
        weights = Weights(file)
        self._norm = weights.vector("output_norm.weight", spec.hidden)
        tied = not weights.has("output.weight")
        head = "token_embd.weight" if tied else "output.weight"
        self._head = weights.linear(head, spec.vocab, spec.hidden)
        self._embedding = self._open_embedding(weights, max_tokens, tied, stored_embedding)
        layers = []
        for index, kind in enumerate(spec.layers):
            mixer = AttentionWeights if kind == "attention" else DeltaWeights
            layers.append(LayerWeights(mixer.load(weights, spec, index),
                                       MoEWeights.load(weights, spec, index)))  # fmt: skip
            if on_layer is not None:
                on_layer(index)
        self.layers = tuple(layers)
        self._mixers = [_mixer(w.mixer, spec, i, int8=int8) for i, w in enumerate(layers)]
        self._moe = MoEBlock(tuple(w.moe for w in layers), spec, max_tokens, int8=int8)
        self._hidden = Buffer(max_tokens, spec.hidden)
        self._last = Activations(HEAD_ROWS, spec.hidden, int8=int8)
        self._logits = Buffer(HEAD_ROWS, spec.vocab)

    def _open_embedding(
        self, weights: Weights, max_tokens: int, tied: bool, stored: bool
    ) -> Embedding | StoredEmbedding:
        if tied:
            return Embedding(self._head)
        name, shape = "token_embd.weight", (self.spec.vocab, self.spec.hidden)
        if stored:
            return StoredEmbedding(weights.stored(name, *shape, max_tokens), max_tokens)
        return Embedding(weights.linear(name, *shape))

    def embed(self, batch: Batch) -> F32:
        """Return the residual stream float32 [T, D] of the batch's tokens."""
        x = self._hidden.at(batch.size)
        self._embedding(batch.tokens, x)
        return x

    def mix(self, layer: int, x: F32, batch: Batch) -> None:
        """Run the layer's attention or DeltaNet on the residual stream in place."""
        self._mixers[layer](x, batch)

    def scores(self, layer: int, x: F32) -> tuple[F32, F32]:
        """Return the experts' input [T, D] and the router scores [T, E]."""
        return self._moe.scores(layer, x)

    def look_ahead(self, layer: int, x: F32) -> F32:
        """Return the scores that `layer`'s router gives to an earlier layer's residual stream."""
        return self._moe.look_ahead(layer, x)

    def shared(self, layer: int, h: F32) -> F32:
        """Return the shared expert's gated output [T, D]."""
        return self._moe.shared(layer, h)

    def close(self, x: F32, routed: F32, shared: F32) -> None:
        """End a layer: residual = (routed + shared) + residual, in place."""
        ops.add3(routed, shared, x)

    def logits(self, x: F32, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits float32 [n, V] of n <= HEAD_ROWS rows of the last residual."""
        h = self._last.at(len(rows))
        ops.rms_norm(np.ascontiguousarray(x[rows]), self._norm, self.spec.eps, h.x)
        return self._head(h.quantize(), self._logits.at(len(rows)))

    @property
    def nbytes(self) -> int:
        """Bytes of dense weights held."""
        seen: dict[int, int] = {}
        for weights in (self._head, *_linears(self.layers)):
            seen[id(weights.weight)] = weights.weight.nbytes
        return sum(seen.values())


def _mixer(
    weights: AttentionWeights | DeltaWeights, spec: ModelSpec, index: int, *, int8: bool
) -> AttentionLayer | DeltaLayer:
    if isinstance(weights, AttentionWeights):
        return AttentionLayer(weights, spec, index, int8=int8)
    return DeltaLayer(weights, spec, index, int8=int8)


def _linears(layers: tuple[LayerWeights, ...]) -> list[Linear]:
    return [
        value
        for layer in layers
        for part in (layer.mixer, layer.moe)
        for name in part.__slots__
        if isinstance(value := getattr(part, name), Linear)
    ]
