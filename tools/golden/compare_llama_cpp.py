"""How far llama.cpp's logits, and optionally fomoe's, are from the float64 reference.

    PYTHONPATH=tests python tools/golden/compare_llama_cpp.py MODEL.gguf --tokens IDS.npz
    ... --logits fomoe.npy      # also: logits float32 [T, V] written by `fomoe logits`

Prints one JSON object: median and maximum over the positions of the relative L2 error, and how
often the most likely token is the same. Positions whose routing margin in the reference is below
`--margin` are left out, because there another expert may rightly be chosen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from reference.qwen35moe_f64 import Model, forward, relative_l2

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}


def llama_logits(path: Path, tokens: npt.NDArray[np.int32], kv: str, batch: int) -> Any:
    """Logits float32 [T, V] of llama.cpp on the CPU, `batch` tokens at once."""
    llama = llama_cpp.Llama(
        model_path=str(path),
        n_ctx=len(tokens) + 1,
        n_batch=batch,
        n_ubatch=batch,
        logits_all=True,
        type_k=KV_TYPES[kv],
        type_v=KV_TYPES[kv],
        verbose=False,
    )
    llama.eval(tokens.tolist())
    return llama.scores[: len(tokens)].copy()


def read_tokens(source: str) -> npt.NDArray[np.int32]:
    """Ids from an .npz with an array `tokens`, an .npy, or a comma-separated list."""
    if source.endswith((".npz", ".npy")):
        loaded = np.load(source)
        return np.asarray(loaded["tokens"] if source.endswith(".npz") else loaded, np.int32)
    return np.array([int(part) for part in source.split(",")], np.int32)


def errors(
    actual: npt.NDArray[Any], expected: npt.NDArray[Any], keep: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Relative L2 error and agreement of the most likely token over the kept positions."""
    error = relative_l2(actual, expected)[keep]
    same = (actual.argmax(axis=1) == expected.argmax(axis=1))[keep]
    return {
        "median": float(np.median(error)),
        "max": float(error.max()),
        "same_top_token": float(same.mean()),
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything that the command line asks for."""
    tokens = read_tokens(args.tokens)[: args.limit]
    result = forward(args.model, tokens, kv=args.kv)
    keep = result.routing_margin(Model(args.model).top_k) >= args.margin
    llama = llama_logits(args.model, tokens, args.kv, args.batch or len(tokens))
    report = {
        "model": args.model.name,
        "tokens": len(tokens),
        "kept": int(keep.sum()),
        "kv": args.kv,
        "llama_cpp_to_reference": errors(llama, result.logits, keep),
    }
    if args.logits is not None:
        fomoe = np.load(args.logits)[: len(tokens)]
        report["fomoe_to_reference"] = errors(fomoe, result.logits, keep)
        report["fomoe_to_llama_cpp"] = errors(fomoe, llama, keep)
    return report


def main() -> None:
    """Parse the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", required=True, help="IDS.npz, IDS.npy or 1,2,3")
    parser.add_argument("--logits", type=Path, help="logits [T, V] of fomoe for the same ids")
    parser.add_argument("--kv", choices=sorted(KV_TYPES), default="f32")
    parser.add_argument("--margin", type=float, default=0.0)
    parser.add_argument("--limit", type=int, help="use only the first ids")
    parser.add_argument("--batch", type=int, default=0, help="tokens at once; 0: all, 1: decode")
    print(json.dumps(compare(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
