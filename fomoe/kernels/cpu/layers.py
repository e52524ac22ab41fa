"""The dense parts of a layer, each as one call of the native module.

Each object checks its weights once and keeps them alive. `weights` is a dict by field name:
matrices as (ggml type, uint8 [rows, row_bytes]), vectors as float32 arrays. The bits are those of
the operations of `ops` one after the other; tokens go through in tiles, so that working memory does
not grow with a prompt.
"""

from fomoe.kernels.cpu._cpu import AttentionMixer, DeltaMixer, MoeDense

__all__ = ["AttentionMixer", "DeltaMixer", "MoeDense"]
