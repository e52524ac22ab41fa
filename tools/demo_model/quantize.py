"""Quantise a GGUF with llama.cpp.

    python tools/demo_model/quantize.py demo-F16.gguf models/fomoe-demo-Q4_K_M.gguf

Rows that do not divide by 256 (the experts' down projection) fall back to Q5_0 or Q8_0.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import llama_cpp


def quantize(source: Path, target: Path, kind: str = "Q4_K_M") -> None:
    """Write `target` in llama.cpp's mixture `kind`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = os.cpu_count() or 1
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status != 0:
        raise SystemExit(f"llama.cpp could not quantise {source} (status {status})")


def main() -> None:
    """Quantise the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", default="Q4_K_M")
    args = parser.parse_args()
    quantize(args.source, args.target, args.type)


if __name__ == "__main__":
    main()
