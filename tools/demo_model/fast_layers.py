"""Training-speed replacements for three parts of transformers' Qwen3.5-MoE.

Parameters and results are the original's; what changes is how they are computed: the DeltaNet
recurrence by chunks with one batched triangular solve, the experts by one grouped matrix product
over tokens sorted by expert, the norms by torch's fused kernel. No caches: training and scoring.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F  # noqa: N812
from fast_deltanet import deltanet_forward
from fast_experts import moe_forward
from torch import Tensor, nn

DROPPED = (
    "Embedding",
    "Qwen3_5MoeGatedDeltaNet",
    "Qwen3_5MoeAttention",
    "Qwen3_5MoeSparseMoeBlock",
)


def install(model: nn.Module, dropout: float = 0.0) -> list[Tensor]:
    """Replace the forwards in place; return the list that collects one balance loss per layer."""
    balance: list[Tensor] = []
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Qwen3_5MoeRMSNorm":
            module.forward = MethodType(_norm_forward, module)
        elif kind == "Qwen3_5MoeGatedDeltaNet":
            module.forward = MethodType(deltanet_forward, module)
        elif kind == "Qwen3_5MoeSparseMoeBlock":
            module.balance = balance
            module.forward = MethodType(moe_forward, module)
        if dropout and kind in DROPPED:
            module.register_forward_hook(_drop_output(dropout))
    return balance


def _drop_output(rate: float) -> Any:
    """Forward hook: dropout on what a block adds to the residual stream."""

    def hook(module: nn.Module, _args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (F.dropout(out[0], rate, module.training), *out[1:])
        return F.dropout(out, rate, module.training)

    return hook


def _norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm with weight stored as distance from one."""
    return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight, self.eps).type_as(x)
