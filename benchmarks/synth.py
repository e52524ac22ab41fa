"""Writes model files with the true shapes of Qwen3.5's mixture-of-experts models, any depth.

Run: python benchmarks/synth.py --shape 397b-a17b --layers 4 --out DIR [--freq FILE]
     python benchmarks/synth.py --verify DIR/397b-a17b-4l.gguf

Weights are random quant blocks in the Q4_K_M mix; routing is made to look real (`synthetic/`):
the benchmark's text is the run of token ids that the recipe names. The recipe, with the locality
that fomoe's own routers show on the file, is written beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from synthetic.locality import Locality
from synthetic.model_file import Recipe, write_model
from synthetic.shapes import SHAPES
from synthetic.verify import verify

WARMUP, SCORED = 512, 512
SLOT_SHARES = (50 / 512, 86 / 512, 128 / 512)


def recipe_path(model: Path) -> Path:
    """Return where a model's recipe lies."""
    return model.with_suffix(".json")


def save_recipe(model: Path, recipe: Recipe) -> None:
    """Write the recipe of a file that was just made."""
    plain = asdict(recipe) | {"freq": recipe.freq and recipe.freq.name}
    text = {"first_id": 0, "ids": min(recipe.drift.period, recipe.shape.vocab) - 3}
    data = {"model": model.name, "bytes": model.stat().st_size, "recipe": plain, "text": text}
    recipe_path(model).write_text(json.dumps(data, indent=1) + "\n")


def verify_file(model: Path) -> Locality:
    """Measure a file's locality and note it in its recipe."""
    data = json.loads(recipe_path(model).read_text())
    experts, text = data["recipe"]["shape"]["experts"], data["text"]
    count = min(WARMUP + SCORED, text["ids"])
    tokens = list(range(text["first_id"], text["first_id"] + count))
    slots = tuple(round(share * experts) for share in SLOT_SHARES)
    locality = verify(model, tokens, slots, warmup=count - SCORED)
    data["locality"] = asdict(locality)
    recipe_path(model).write_text(json.dumps(data, indent=1) + "\n")
    return locality


def write(args: argparse.Namespace) -> Path:
    """Write the file and its recipe."""
    shape = SHAPES[args.shape]
    layers = args.layers or shape.full_layers
    recipe = Recipe(shape=shape, layers=layers, seed=args.seed, update=args.update, freq=args.freq)
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.out / (args.name or f"{shape.name}-{layers}l.gguf")
    start = time.monotonic()
    write_model(model, recipe)
    size, seconds = model.stat().st_size, time.monotonic() - start
    print(f"{model}: {size / 1e9:.2f} GB in {seconds:.0f} s, {size / seconds / 1e9:.2f} GB/s")
    save_recipe(model, recipe)
    return model


def main() -> None:
    """Write a file, measure its routing, print both; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="4 or more; as deep as the real model if absent")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--name", help="file name; <shape>-<layers>l.gguf if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freq", type=Path, help="expert frequencies, in place of the fitted law")
    parser.add_argument("--update", type=float, default=0.1, help="what a sublayer adds")
    parser.add_argument("--no-verify", action="store_true", help="write only")
    parser.add_argument("--verify", type=Path, help="measure a file that was written before")
    args = parser.parse_args()
    if args.verify is None and args.shape is None:
        parser.error("give --shape to write a file or --verify to measure one")
    model = args.verify or write(args)
    if not args.no_verify:
        print(verify_file(model).text())
    print(json.dumps(json.loads(recipe_path(model).read_text())))


if __name__ == "__main__":
    main()
