"""Perplexity of a GGUF over a text, with llama-cpp-python.

    python tools/demo_model/ppl_llama_cpp.py model.gguf text.txt --save-ids ids.json

The text is encoded with the GGUF's own vocabulary, without BOS, and cut into windows of 512 ids;
a last partial window is left out. Each window starts from an empty state. The logits at positions
256 to 510 are scored, each against the id that follows it (ids 257 to 511 of the window), so every
scored prediction has at least 257 ids of context.

Words and bytes are those of the whole text, so word perplexity and bits per byte scale the mean
loss per scored token by tokens per word and per byte of the whole text.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import llama_cpp
import numpy as np

CONTEXT = 512
FIRST = 256


def encode(model: llama_cpp.Llama, text: str) -> list[int]:
    """Token ids without BOS; special tokens in the text are plain text."""
    return model.tokenize(text.encode("utf-8"), add_bos=False, special=False)


def window_loss(model: llama_cpp.Llama, window: list[int]) -> float:
    """Sum of -log p(id) over ids 257 to 511 of one window, in nats."""
    model.reset()
    model.eval(window)
    logits = np.asarray(model.scores[FIRST : CONTEXT - 1], dtype=np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(logits)), window[FIRST + 1 :]]
    return float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())


def report(text: str, ids: list[int], windows: int, loss: float) -> dict[str, float]:
    """Figures from the summed loss over `windows` windows."""
    scored = windows * (CONTEXT - 1 - FIRST)
    mean = loss / scored
    words = text.count("\n") + len(text.split())
    return {
        "tokens": len(ids),
        "windows": windows,
        "scored_tokens": scored,
        "nats_per_token": mean,
        "token_perplexity": math.exp(mean),
        "words": words,
        "word_perplexity": math.exp(mean * len(ids) / words),
        "bytes": len(text.encode("utf-8")),
        "bits_per_byte": mean * len(ids) / len(text.encode("utf-8")) / math.log(2),
    }


def main() -> None:
    """Score the text named on the command line and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, help="only the first N windows")
    parser.add_argument("--threads", type=int, default=1, help="1 is best on a busy machine")
    parser.add_argument("--save-ids", type=Path, help="write all token ids as a JSON list")
    args = parser.parse_args()
    text = args.text.read_bytes().decode("utf-8")
    model = llama_cpp.Llama(
        str(args.model),
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        logits_all=True,
        verbose=False,
        n_threads=args.threads,
        n_threads_batch=args.threads,
    )
    ids = encode(model, text)
    if args.save_ids:
        args.save_ids.write_text(json.dumps(ids))
    windows = len(ids) // CONTEXT
    if args.windows:
        windows = min(windows, args.windows)
    loss = sum(window_loss(model, ids[n * CONTEXT : (n + 1) * CONTEXT]) for n in range(windows))
    print(json.dumps({"model": args.model.name, **report(text, ids, windows, loss)}, indent=1))


if __name__ == "__main__":
    main()
