"""Train the demo model for a given time on one GPU (or a toy of it on a CPU).

    python tools/demo_model/train.py corpus.txt.xz tokenizer.json out/ --seconds 960

Writes `weights.pt` (matrices float16, the rest float32), `config.json` and `report.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import batches, encode_corpus
from evaluate import PROMPTS, answer, window_perplexity
from model_config import demo_config, new_model, tiny_config
from tokenizers import Tokenizer
from torch import Tensor, nn
from train_step import Step

LOG_EVERY = 20


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--seconds", type=float, default=960)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--hold", type=float, default=0.2, help="time share before the linear tail")
    parser.add_argument("--balance", type=float, default=0.002)
    parser.add_argument("--balance-over", choices=("layer", "model"), default="layer")
    parser.add_argument("--check-every", type=float, default=60, help="seconds between checks")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph for the step")
    return parser.parse_args()


def rate(step: int, share: float, args: argparse.Namespace) -> float:
    """Learning rate after `share` of the time: warm-up, a plateau, then linearly to zero."""
    tail = min(1.0, max(0.0, 1.0 - share) / (1.0 - args.hold))
    return args.lr * min(1.0, (step + 1) / args.warmup) * tail


def train(
    model: nn.Module, ids: dict[str, Tensor], stream: Iterator[Tensor], args: argparse.Namespace
) -> dict:
    """Run the loop until the time is over; returns the figures for the report."""
    learn = Step(model, args)
    if learn.device.type == "cuda" and not args.eager:
        learn.capture(stream)
    begin = last = time.monotonic()
    history: list[dict] = []
    step = 0
    while (spent := time.monotonic() - begin) < args.seconds:
        learn(next(stream), rate(step, spent / args.seconds, args))
        step += 1
        if step % LOG_EVERY == 0:
            mean, now = float(learn.loss_sum) / LOG_EVERY, time.monotonic()
            learn.loss_sum.zero_()
            history.append({"step": step, "seconds": round(now - begin, 2), "loss": round(mean, 4)})
            if now - last > args.check_every:
                last = now
                history[-1].update(check(model, ids))
                print(json.dumps(history[-1]), flush=True)
    return {
        "steps": step,
        "tokens": step * args.batch * args.length,
        "seconds": round(time.monotonic() - begin, 1),
        "final_loss": history[-1]["loss"] if history else None,
        "history": history,
    }


def check(model: nn.Module, ids: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity on each held-out id sequence."""
    kind = next(model.parameters()).device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
        return {name: round(window_perplexity(model, one)[0], 3) for name, one in ids.items()}


def save(model: nn.Module, config: dict, report: dict, output: Path) -> None:
    """Write the three result files."""
    output.mkdir(parents=True, exist_ok=True)
    small = {
        name: value.detach().cpu().to(torch.float16 if value.ndim > 1 else torch.float32)
        for name, value in model.state_dict().items()
    }
    torch.save(small, output / "weights.pt")
    (output / "config.json").write_text(json.dumps(config, indent=1))
    (output / "report.json").write_text(json.dumps(report, indent=1))


def main() -> None:
    """Encode, train, evaluate, save."""
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    began = time.monotonic()
    text, held = encode_corpus(args.corpus, tokenizer)
    print(
        json.dumps({"tokens": len(text), "encode_s": round(time.monotonic() - began, 1)}),
        flush=True,
    )
    ids = {"held_out": torch.from_numpy(held[:65536].astype("int64")).to(device)}
    if args.eval_text:
        whole = tokenizer.encode(args.eval_text.read_text(encoding="utf-8")).ids
        ids["wikitext"] = torch.tensor(whole[:65536], device=device)
    make = tiny_config if args.tiny else demo_config
    config = make(tokenizer.get_vocab_size())
    model = new_model(config).to(device)
    report = train(model, ids, batches(text, args.batch, args.length, device), args)
    if args.eval_text:
        ids["wikitext"] = torch.tensor(whole, device=device)
    report |= {"corpus_tokens": len(text)} | check(model, ids)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        report["samples"] = [
            {
                "prompt": p,
                "greedy": answer(model, tokenizer, p, 0),
                "t0.7": answer(model, tokenizer, p, 0.7),
            }
            for p in PROMPTS
        ]
    save(model, config.to_dict(), report, args.output)
    print(json.dumps({k: v for k, v in report.items() if k != "history"}, indent=1))


if __name__ == "__main__":
    main()
