"""Decodes many sequences of a Qwen3.5-MoE side by side in torch, with routing left to a caller.

Every row is one sequence at the same position, with a KV cache and a DeltaNet state of its own, so
that rows which share a text and differ in their router's rule can be compared token by token. The
arithmetic is bfloat16 with float32 norms, router, recurrence and softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Experts of a layer: `ids` int64 [R, n], `weights` float32 [R, n].

    `fill` float32 [R, E], where given, are weights of experts that are stood in for by their
    calibrated mean output.
    """

    ids: Tensor
    weights: Tensor
    fill: Tensor | None = None


Route = Callable[[int, Tensor], Choice]  # layer, router scores float32 [R, E]


class State:
    """What R sequences carry: `position`, KV caches, convolution windows, DeltaNet states."""

    def __init__(self, parts: list[tuple[Tensor, ...]], position: int = 0) -> None:
        self.parts = parts
        self.position = position

    def repeat(self, times: int) -> State:
        """Return `times` copies, one after the other along the rows."""
        return self._each(lambda t: t.repeat(times, *[1] * (t.ndim - 1)))

    def rows_from(self, first: int) -> State:
        """Return a copy of the rows from `first` on."""
        return self._each(lambda t: t[first:].clone())

    def _each(self, change: Callable[[Tensor], Tensor]) -> State:
        parts = [tuple(change(t) for t in part) for part in self.parts]
        return State(parts, self.position)


class LabDecoder:
    """A trained model, frozen for decoding.

    `means` float32 [L, E, D] are the experts' calibrated mean outputs, for `Choice.fill`.
    """

    def __init__(self, model: nn.Module) -> None:
        config = model.config
        self.config = config
        dtype = torch.bfloat16 if next(model.parameters()).is_cuda else torch.float32
        self.dtype = dtype
        self.embed = model.model.embed_tokens.weight.detach()
        self.norm = 1.0 + model.model.norm.weight.detach().float()
        self.head = model.lm_head.weight.detach().to(dtype)
        self.eps = config.rms_norm_eps
        self.layers = [_Layer(layer, config, dtype) for layer in model.model.layers]
        self.means: Tensor | None = None
        self.sums: Tensor | None = None  # [L, E, D + 1], filled while not None

    def new_state(self, rows: int, length: int) -> State:
        """Return the empty state of `rows` sequences of up to `length` tokens."""
        return State([layer.mixer.new_state(rows, length) for layer in self.layers])

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State, route: Route, *, logits: bool = True) -> Tensor:
        """Run one token of each row; returns logits float32 [R, V], or the hidden state."""
        x = self.embed[tokens].float()
        for index, layer in enumerate(self.layers):
            h = F.rms_norm(x, (x.shape[1],), layer.norm1, self.eps)
            x = x + layer.mixer.step(h.to(self.dtype), state.parts[index], state.position).float()
            h = F.rms_norm(x, (x.shape[1],), layer.norm2, self.eps)
            x = x + self._experts(index, layer, h, route)
        state.position += 1
        if not logits:
            return x
        h = F.rms_norm(x, (x.shape[1],), self.norm, self.eps)
        return (h.to(self.dtype) @ self.head.T).float()

    def _experts(self, index: int, layer: _Layer, h: Tensor, route: Route) -> Tensor:
        choice = route(index, h @ layer.router.T)
        low = h.to(self.dtype)
        out = layer.experts(low, choice, None if self.sums is None else self.sums[index])
        if choice.fill is not None and self.means is not None:
            out = out + choice.fill @ self.means[index]
        return out + layer.shared(low)


class _Layer:
    def __init__(self, layer: nn.Module, config: Any, dtype: torch.dtype) -> None:
        self.norm1 = 1.0 + layer.input_layernorm.weight.detach().float()
        self.norm2 = 1.0 + layer.post_attention_layernorm.weight.detach().float()
        linear = hasattr(layer, "linear_attn")
        self.mixer: _Mixer = (
            _DeltaNet(layer.linear_attn, config, dtype)
            if linear
            else _Attention(layer.self_attn, config, dtype)
        )
        moe = layer.mlp
        self.router = moe.gate.weight.detach().float()
        self.gate_up = moe.experts.gate_up_proj.detach().to(dtype)
        self.down = moe.experts.down_proj.detach().to(dtype)
        one = moe.shared_expert
        self.shared_weights = [
            w.weight.detach().to(dtype) for w in (one.gate_proj, one.up_proj, one.down_proj)
        ]
        self.shared_gate = moe.shared_expert_gate.weight.detach().to(dtype)

    def shared(self, h: Tensor) -> Tensor:
        gate, up, down = self.shared_weights
        out = (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
        return out.float() * torch.sigmoid((h @ self.shared_gate.T).float())

    def experts(self, h: Tensor, choice: Choice, sums: Tensor | None) -> Tensor:
        """Weighted sum of the chosen experts, float32 [R, D]; adds outputs to `sums` [E, D + 1]."""
        rows, k = choice.ids.shape
        ids, order = choice.ids.flatten().to(torch.int16).sort()
        every = torch.arange(len(self.gate_up), device=h.device, dtype=torch.int16)
        ends = torch.searchsorted(ids, every, right=True).to(torch.int32)
        hidden = _grouped(h[order // k], self.gate_up, ends)
        gate, up = hidden.chunk(2, dim=-1)
        out = _grouped(F.silu(gate) * up, self.down, ends)
        if sums is not None:
            sums[:, :-2].index_add_(0, ids.long(), out.float())
            sums[:, -2].index_add_(0, ids.long(), out.float().square().sum(-1))
            sums[:, -1].index_add_(0, ids.long(), torch.ones(len(ids), device=h.device))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=h.device)
        parts = out[back].view(rows, k, -1)
        return torch.einsum("rkd,rk->rd", parts.float(), choice.weights)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if x.is_cuda:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


class _Mixer(Protocol):
    def new_state(self, rows: int, length: int) -> tuple[Tensor, ...]: ...

    def step(self, h: Tensor, state: tuple[Tensor, ...], position: int) -> Tensor: ...


class _DeltaNet:
    def __init__(self, m: nn.Module, config: Any, dtype: torch.dtype) -> None:
        self.qkv, self.z, self.b, self.a, self.out = (
            w.weight.detach().to(dtype)
            for w in (m.in_proj_qkv, m.in_proj_z, m.in_proj_b, m.in_proj_a, m.out_proj)
        )
        self.taps = m.conv1d.weight.detach()[:, 0].float()  # [C, 4]
        self.bias, self.decay = m.dt_bias.detach().float(), -m.A_log.detach().float().exp()
        self.norm = m.norm.weight.detach().float()
        self.heads = m.num_v_heads, m.num_k_heads
        self.dims = m.head_k_dim, m.head_v_dim
        self.eps = config.rms_norm_eps

    def new_state(self, rows: int, length: int) -> tuple[Tensor, ...]:
        del length
        channels, width = self.taps.shape
        device = self.taps.device
        window = torch.zeros(rows, width - 1, channels, device=device)
        state = torch.zeros(rows, self.heads[0], *self.dims, device=device)
        return window, state

    def step(self, h: Tensor, state: tuple[Tensor, ...], position: int) -> Tensor:
        del position
        window, memory = state
        (n_v, n_k), (k_dim, v_dim) = self.heads, self.dims
        rows = len(h)
        mixed = (h @ self.qkv.T).float()
        conv = torch.einsum("rwc,cw->rc", window, self.taps[:, :-1]) + mixed * self.taps[:, -1]
        window.copy_(torch.cat([window[:, 1:], mixed[:, None]], dim=1))
        q, k, v = F.silu(conv).split([n_k * k_dim, n_k * k_dim, n_v * v_dim], dim=-1)
        q, k = (_unit(t.view(rows, n_k, k_dim)).repeat_interleave(n_v // n_k, 1) for t in (q, k))
        v = v.view(rows, n_v, v_dim)
        beta = (h @ self.b.T).float().sigmoid()
        decay = (self.decay * F.softplus((h @ self.a.T).float() + self.bias)).exp()
        memory.mul_(decay[..., None, None])
        known = (k[:, :, None] @ memory)[:, :, 0]
        fresh = beta[..., None] * (v - known)
        flat = memory.view(-1, k_dim, v_dim)
        flat.baddbmm_(k.reshape(-1, k_dim, 1), fresh.reshape(-1, 1, v_dim))
        out = ((q * k_dim**-0.5)[:, :, None] @ memory)[:, :, 0]
        out = F.rms_norm(out, (v_dim,), self.norm, self.eps)
        z = (h @ self.z.T).float().view(rows, n_v, v_dim)
        return (out * F.silu(z)).reshape(rows, -1).to(h.dtype) @ self.out.T


class _Attention:
    def __init__(self, m: nn.Module, config: Any, dtype: torch.dtype) -> None:
        self.q, self.k, self.v, self.o = (
            w.weight.detach().to(dtype) for w in (m.q_proj, m.k_proj, m.v_proj, m.o_proj)
        )
        self.q_norm, self.k_norm = (1.0 + w.weight.detach().float() for w in (m.q_norm, m.k_norm))
        self.dim, self.eps = m.head_dim, config.rms_norm_eps
        self.n_kv = config.num_key_value_heads
        rotary = int(self.dim * config.rope_parameters["partial_rotary_factor"])
        base = config.rope_parameters["rope_theta"]
        steps = torch.arange(0, rotary, 2, device=self.q.device).float() / rotary
        self.frequencies = base**-steps

    def new_state(self, rows: int, length: int) -> tuple[Tensor, ...]:
        shape = (rows, self.n_kv, length, self.dim)
        keys, values = (
            torch.zeros(shape, device=self.q.device, dtype=self.q.dtype) for _ in range(2)
        )
        return keys, values

    def step(self, h: Tensor, state: tuple[Tensor, ...], position: int) -> Tensor:
        keys, values = state
        rows, dim = len(h), self.dim
        q, gate = (h @ self.q.T).view(rows, -1, 2, dim).unbind(2)
        q = self._turn(F.rms_norm(q.float(), (dim,), self.q_norm, self.eps), position)
        k = (h @ self.k.T).view(rows, -1, dim).float()
        keys[:, :, position] = self._turn(
            F.rms_norm(k, (dim,), self.k_norm, self.eps), position
        ).to(h.dtype)
        values[:, :, position] = (h @ self.v.T).view(rows, -1, dim)
        seen_k, seen_v = keys[:, :, : position + 1], values[:, :, : position + 1]
        q = q.to(h.dtype).view(rows, self.n_kv, -1, dim)
        scores = (q @ seen_k.transpose(2, 3)).float() * dim**-0.5
        out = (scores.softmax(-1).to(h.dtype) @ seen_v).view(rows, -1, dim)
        return (out * torch.sigmoid(gate)).reshape(rows, -1) @ self.o.T

    def _turn(self, x: Tensor, position: int) -> Tensor:
        half = len(self.frequencies)
        angle = position * self.frequencies
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
