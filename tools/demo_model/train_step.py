"""One optimiser step: AdamW on cross entropy plus router balance, as a CUDA graph on a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import fast_layers
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices other than the embedding and the convolutions."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "embed_tokens" in name or "conv1d" in name
        (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    cuda = next(model.parameters()).is_cuda
    lr = torch.tensor(args.lr, device="cuda") if cuda else args.lr
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=cuda, capturable=cuda)


class Step:
    """One optimiser step on a [batch, length + 1] window; on a GPU one captured graph."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        """Install the fast layers and the optimiser; `args` as on the command line."""
        self.model, self.args = model, args
        self.balance = fast_layers.install(model, args.dropout)
        self.device = next(model.parameters()).device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.optimizer = make_optimizer(model, args)
        self.window = torch.zeros(args.batch, args.length + 1, dtype=torch.long, device=self.device)
        self.loss_sum = torch.zeros((), device=self.device)

    def capture(self, stream: Iterator[Tensor]) -> None:
        """Warm up on real batches with almost no learning rate, then record the graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.window.copy_(next(stream))
                self._set_rate(1e-7)
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self.graph = graph
        self.loss_sum.zero_()

    def __call__(self, window: Tensor, learning_rate: float) -> None:
        """Learn from one window and add its cross entropy to `loss_sum`."""
        self.window.copy_(window)
        self._set_rate(learning_rate)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

    def _imbalance(self) -> Tensor:
        """E times the product of shares and probabilities: of each layer, or of their mean."""
        shares, probs = torch.stack(self.balance).unbind(1)  # [L, E] each
        if self.args.balance_over == "model":
            shares, probs = shares.mean(0), probs.mean(0)
        return shares.shape[-1] * (shares * probs).sum()

    def _run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.balance.clear()
        kind = self.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            logits = self.model(input_ids=self.window[:, :-1], use_cache=False).logits
        entropy = F.cross_entropy(logits.float().flatten(0, 1), self.window[:, 1:].flatten())
        (entropy + self.args.balance * self._imbalance()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss_sum += entropy.detach()
