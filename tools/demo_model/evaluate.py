"""Perplexity and chat samples of a model in torch (for checks during training)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from torch import Tensor, nn

CONTEXT = 512
FIRST_SCORED = 256
PROMPTS = (
    "What is the capital of France?",
    "Tell me a short story about a small dog.",
    "Tom has 5 apples and buys 7 more. How many apples does he have?",
    "What is a mixture of experts?",
    "Write a sentence about the sea.",
)


@torch.no_grad()
def window_perplexity(model: nn.Module, ids: Tensor, batch: int = 32) -> tuple[float, int]:
    """Perplexity over whole windows of 512 ids, each predicting its positions 257 to 511.

    Equal to llama.cpp's scheme without BOS: the first half of a window is context only.
    """
    model.eval()
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total, count = 0.0, 0
    for part in windows.split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, FIRST_SCORED:-1]
        target = part[:, FIRST_SCORED + 1 :]
        total += float(
            F.cross_entropy(logits.float().flatten(0, 1), target.flatten()) * target.numel()
        )
        count += target.numel()
    model.train()
    return math.exp(total / count), count


@torch.no_grad()
def answer(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, temperature: float, limit: int = 80
) -> str:
    """One ChatML answer, recomputing the whole sequence per token."""
    model.eval()
    device = next(model.parameters()).device
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text).ids
    stop = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
    start = len(ids)
    while len(ids) - start < limit:
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        if temperature:
            token = int(torch.multinomial((logits.float() / temperature).softmax(-1), 1))
        else:
            token = int(logits.argmax())
        if token in stop:
            break
        ids.append(token)
    model.train()
    return tokenizer.decode(ids[start:])
