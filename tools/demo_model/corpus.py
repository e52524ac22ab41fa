"""Token ids of the training text, and endless shuffled batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from train_tokenizer import END_OF_TEXT, documents, read_text

HOLD_OUT_EVERY = 200


def encode_corpus(path: Path, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids (uint16) of the training documents and of every 200th document, held out.

    Documents are followed by `<|endoftext|>`; they are shuffled once, with a fixed seed.
    """
    docs = list(documents(read_text(path)))
    order = np.random.default_rng(0).permutation(len(docs))
    end = tokenizer.token_to_id(END_OF_TEXT)
    train: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for first in range(0, len(docs), 2000):
        encoded = tokenizer.encode_batch_fast([docs[i] for i in order[first : first + 2000]])
        for place, one in enumerate(encoded):
            target = train if place % HOLD_OUT_EVERY else held
            target.append(np.array([*one.ids, end], dtype=np.uint16))
    return np.concatenate(train), np.concatenate(held)


def batches(
    ids: np.ndarray, batch: int, length: int, device: torch.device, seed: int = 0
) -> Iterator[torch.Tensor]:
    """Endless [batch, length + 1] windows: each epoch cuts at another phase and shuffles."""
    data = torch.from_numpy(ids.astype(np.int32)).to(device)
    rng = torch.Generator().manual_seed(seed)
    window = torch.arange(length + 1, device=device)
    while True:
        phase = int(torch.randint(length, (1,), generator=rng))
        starts = torch.arange(phase, len(ids) - length - 1, length)
        starts = starts[torch.randperm(len(starts), generator=rng)].to(device)
        for part in starts.split(batch):
            if len(part) == batch:
                yield data[part[:, None] + window].long()
