"""Which quantisation type each tensor has in a file that `llama-quantize ... Q4_K_M` writes."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_ELEMENTS = 256  # of the K types
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class Mix:
    """The Q4_K_M rule for a model of `layers` layers.

    Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's
    src/llama-quant.cpp (commit 007dbbf3). Half of the layers keep the down projections, and what
    holds the attention values (`attn_v`, `attn_qkv`), in Q6_K; the output is Q6_K, the rest Q4_K.
    A file of fewer layers than the model has the rule applied to its own depth, so that the share
    of Q6_K stays a half.
    """

    layers: int

    def kind(self, name: str, layer: int, columns: int) -> str:
        """Return the type of `name` (without `blk.N.`), whose rows have `columns` weights."""
        fine = name.startswith(("ffn_down", "attn_v", "attn_qkv")) and self._more_bits(layer)
        kind = "Q6_K" if fine or name == "output.weight" else "Q4_K"
        return kind if columns % BLOCK_ELEMENTS == 0 else FALLBACK[kind]

    def _more_bits(self, layer: int) -> bool:
        eighth = self.layers // 8
        outer = layer < eighth or layer >= 7 * self.layers // 8
        return outer or (layer - eighth) % 3 == 2
