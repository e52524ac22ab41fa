"""Mixture-of-experts block for training: tokens sorted by expert, grouped matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def moe_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Routed and shared experts; adds the experts' shares and mean probabilities to `balance`."""
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    router = self.gate
    with torch.autocast(flat.device.type, enabled=False):
        probs = F.linear(flat.float(), router.weight).softmax(-1)
    weights, chosen = probs.topk(router.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    ids, order = chosen.flatten().to(torch.int16).sort(stable=True)
    every = torch.arange(router.num_experts, device=flat.device, dtype=torch.int16)
    ends = torch.searchsorted(ids, every, right=True).to(torch.int32)
    if self.training:
        share = ends.diff(prepend=ends.new_zeros(1)).float() / ids.numel()
        self.balance.append(torch.stack([share, probs.mean(0)]))
    routed = _experts(self.experts, flat, weights, order, ends)
    gate = torch.sigmoid(self.shared_expert_gate(flat))
    return (routed + gate * self.shared_expert(flat)).reshape(hidden_states.shape)


def _experts(experts: nn.Module, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Sum over each token's experts; x [N, D], weights [N, k], order sorts the N * k pairs."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    k = weights.shape[1]
    rows = _Spread.apply(x.to(dtype), order, back, k)
    hidden = _grouped(rows, experts.gate_up_proj.to(dtype), ends)
    gate, up = hidden.chunk(2, dim=-1)
    scale = weights.flatten()[order, None].to(dtype)
    return _Gather.apply(
        _grouped(F.silu(gate) * up * scale, experts.down_proj.to(dtype), ends), order, back, k
    )


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x times their expert's matrix; x [M, I], weight [E, O, I], ends [E] -> [M, O]."""
    if x.is_cuda:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


class _Spread(torch.autograd.Function):
    """One row per (token, expert) pair, sorted by expert; the gradient gathers them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    """Sum the rows of each token; the gradient spreads them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return rows[back].view(-1, k, rows.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.contiguous()[order // ctx.k], None, None, None
