"""Trains the lab model on documents; the loop that `run.py` starts with."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lab_config import lab_config
from texts import SEPARATOR
from tokenizers import Tokenizer
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo_model"))

from corpus import batches
from model_config import new_model
from train_step import Step

LOG_EVERY = 100


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the trainer's options; `dropout` and the rest of what `Step` reads have lab values."""
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--hold", type=float, default=0.3, help="share before the linear tail")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--balance", type=float, default=0.008)
    parser.add_argument("--balance-over", choices=("layer", "model"), default="model")
    parser.add_argument("--toy", action="store_true", help="a shape for a CPU")
    return parser


def encode(docs: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Ids (uint16) of the training documents, shuffled once."""
    order = np.random.default_rng(0).permutation(len(docs))
    end = tokenizer.token_to_id(SEPARATOR)
    encoded = tokenizer.encode_batch_fast([docs[i] for i in order])
    return np.concatenate([np.array([*one.ids, end], dtype=np.uint16) for one in encoded])


def restore(weights: Path, vocab: int, args: argparse.Namespace) -> nn.Module:
    """Return the model that `train` left in a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(lab_config(vocab, toy=args.toy)).to(device)
    model.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    return model


def train(text: np.ndarray, vocab: int, args: argparse.Namespace) -> nn.Module:
    """Return a model after `args.steps` steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(args.seed)
    model = new_model(lab_config(vocab, toy=args.toy)).to(device)
    stream = batches(text, args.batch, args.length, device, seed=args.seed)
    learn = Step(model, args)
    if device.type == "cuda":
        learn.capture(stream)
    began = time.monotonic()
    step = 0
    while step < args.steps:
        share = step / args.steps
        tail = min(1.0, (1.0 - share) / (1.0 - args.hold))
        learn(next(stream), args.lr * min(1.0, (step + 1) / args.warmup) * tail)
        step += 1
        if step % LOG_EVERY == 0:
            loss = float(learn.loss_sum) / LOG_EVERY
            learn.loss_sum.zero_()
            row = {"step": step, "seconds": round(time.monotonic() - began, 1), "loss": loss}
            print(json.dumps(row), flush=True)
    return model
