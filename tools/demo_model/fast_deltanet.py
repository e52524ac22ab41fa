"""Gated DeltaNet for training: the delta rule by chunks, one triangular solve for all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

CHUNK = 64


def deltanet_forward(self: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
    """Gated DeltaNet over whole sequences; hidden_states [B, T, D] -> [B, T, D]."""
    b, t, _d = hidden_states.shape
    mixed = self.in_proj_qkv(hidden_states)
    mixed = F.silu(_CausalConv.apply(mixed, self.conv1d.weight[:, 0].T.to(mixed.dtype)))
    q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    q, k = (_unit(x.view(b, t, self.num_k_heads, self.head_k_dim).float()) for x in (q, k))
    v = v.view(b, t, self.num_v_heads, self.head_v_dim).float()
    beta = self.in_proj_b(hidden_states).float().sigmoid()
    step = F.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias)
    with torch.autocast(hidden_states.device.type, enabled=False):
        out = delta_rule(q, k, v, -self.A_log.float().exp() * step, beta)
    z = self.in_proj_z(hidden_states).view(b, t, self.num_v_heads, self.head_v_dim)
    out = F.rms_norm(out, (self.head_v_dim,), self.norm.weight, self.norm.variance_epsilon)
    return self.out_proj((out * F.silu(z.float())).to(z.dtype).view(b, t, -1))


class _CausalConv(torch.autograd.Function):
    """Depthwise causal convolution; x [B, T, C], taps [W, C], the last tap on the present."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        total = x * taps[-1]
        for back in range(1, len(taps)):
            total[:, back:].addcmul_(x[:, :-back], taps[-1 - back])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        grad_x, grad_taps = grad * taps[-1], [(grad * x).sum((0, 1))]
        for back in range(1, len(taps)):
            grad_x[:, :-back].addcmul_(grad[:, back:], taps[-1 - back])
            grad_taps.insert(0, (grad[:, back:] * x[:, :-back]).sum((0, 1)))
        return grad_x, torch.stack(grad_taps)


def _unit(x: Tensor) -> Tensor:
    """L2-normalise the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Gated delta rule from a zero state, float32.

    q, k [B, T, Hk, K] (unit length), v [B, T, H, V], log_decay and beta [B, T, H] -> [B, T, H, V].
    Inside a chunk the updates depend on each other through a unit lower triangular system; solving
    it for all chunks at once leaves a recurrence of three products per chunk.
    """
    b, t, heads, v_dim = v.shape
    q, k, v = (_chunked(x, heads) for x in (q * q.shape[-1] ** -0.5, k, v))
    beta, log_decay = (_chunked(x[..., None], heads) for x in (beta, log_decay))
    out = _scan(*_chunk_terms(q, k, v, log_decay.cumsum(2), beta))
    out = out.view(-1, b, heads, CHUNK, v_dim).permute(1, 0, 3, 2, 4)
    return out.reshape(b, -1, heads, v_dim)[:, :t]


def _chunked(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hx, D] -> [chunks, B * H, CHUNK, D], padded with zeros, key heads repeated."""
    b, t = x.shape[:2]
    pad = -t % CHUNK
    x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
    x = x.repeat_interleave(heads // x.shape[2], 2) if x.shape[2] != heads else x
    x = x.reshape(b, -1, CHUNK, heads, x.shape[-1]).permute(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], b * heads, CHUNK, -1)


def _chunk_terms(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """What `_scan` needs of every chunk, all chunks at once; g is the decay's running sum."""
    keep = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    decay = (g - g.transpose(2, 3)).masked_fill(~keep, float("-inf")).exp()
    k_beta, grown, last = k * beta, g.exp(), g[:, :, -1:]
    system = (k_beta @ k.transpose(2, 3) * decay).tril(-1)
    right = torch.cat([v * beta, k_beta * grown], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_v, seen_k = (x.contiguous() for x in solved.split([v.shape[-1], k.shape[-1]], dim=-1))
    within = q @ k.transpose(2, 3) * decay
    return new_v, seen_k, q * grown, within, k * (last - g).exp(), last.exp()


def _scan(*terms: Tensor) -> Tensor:
    """Carry the state [B * H, K, V] from chunk to chunk; returns [chunks, B * H, CHUNK, V]."""
    new_values, seen = terms[:2]
    state = new_values.new_zeros(seen.shape[1], seen.shape[3], new_values.shape[3])
    outputs = []
    for parts in zip(*(term.unbind(0) for term in terms), strict=True):
        new_v, seen_k, q_decayed, within, k_left, carry = parts
        fresh = torch.baddbmm(new_v, seen_k, state, alpha=-1)
        outputs.append(torch.baddbmm(q_decayed @ state, within, fresh))
        state = torch.baddbmm(state * carry, k_left.transpose(1, 2), fresh)
    return torch.stack(outputs)
