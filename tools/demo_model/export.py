"""Turn the training result into an F16 GGUF.

python tools/demo_model/export.py out/ tokenizer.json demo-F16.gguf
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_to_gguf import write_gguf

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def main() -> None:
    """Read `weights.pt` and `config.json` from the training folder and write the GGUF."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    weights = torch.load(args.trained / "weights.pt", weights_only=True)
    write_gguf(
        {name: value.float().numpy() for name, value in weights.items()},
        json.loads((args.trained / "config.json").read_text(encoding="utf-8")),
        args.output,
        tokenizer=json.loads(args.tokenizer.read_text(encoding="utf-8")),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8").rstrip("\n"),
        tensor_type="F16",
        name="fomoe demo",
        license_id="cc-by-sa-3.0",
    )


if __name__ == "__main__":
    main()
