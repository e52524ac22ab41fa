"""Measures what a saved read costs in each layer, and writes the model's loss profile.

One layer at a time is given the price, the others none: KL(exact, answer) over bytes saved, as a
multiple of the layers' median, is the layer's sensitivity. Use text that is not scored later.

    python benchmarks/layer_sensitivity.py TEXT --tokens 5000 --output MODEL.loss.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from quality_contract import NEARLY_EXACT, Bench, read_text, windows

from fomoe.config import RoutingConfig, default_model
from fomoe.engine.shadow import divergence
from fomoe.routing.price import NANO

UNTOUCHED = 1e3  # divides the price of the other layers


def layer_costs(bench: Bench, parts: list[list[int]], price: float) -> list[dict[str, float]]:
    """Return KL in nats per token and the share of all bytes saved, by the layer that is priced."""
    routing = RoutingConfig(shadow_every=0)
    exact = [bench.exact(ids)[bench.prompt : -1] for ids in parts]
    whole = sum(bench.under(NEARLY_EXACT, ids, routing).receipt.logical_bytes for ids in parts)
    costs = []
    for layer in range(bench.spec.n_layers):
        given = tuple(1.0 if i == layer else UNTOUCHED for i in range(bench.spec.n_layers))
        routing = RoutingConfig(shadow_every=0, sensitivities=given)
        n_bytes, kl = 0, []
        for ids, want in zip(parts, exact, strict=True):
            got = bench.under(f"price={price}", ids, routing)
            n_bytes += got.receipt.logical_bytes
            kl += [divergence(a, b) / NANO for a, b in zip(want, got.logits, strict=True)]
        costs.append({"kl": float(np.mean(kl)), "saved": 1 - n_bytes / whole})
        print(layer, costs[-1], flush=True)
    return costs


def main() -> None:
    """Write the profile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--capacity", type=int, default=16)
    parser.add_argument("--price", type=float, default=0.03)
    parser.add_argument("--tokens", type=int, default=5_000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--skip", type=int, default=0, help="characters of the text to leave out")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    path = options.model or default_model()
    bench = Bench(path, options.capacity, options.window, options.prompt)
    ids = bench.tokenizer.encode(read_text(options.text, options.skip, options.tokens * 10))
    parts = list(windows(ids, options.window, options.tokens, options.prompt))
    costs = layer_costs(bench, parts, options.price)
    ratios = np.array([each["kl"] / max(each["saved"], 1e-6) for each in costs])
    sensitivities = [float(f"{value:.3g}") for value in ratios / np.median(ratios)]
    options.output.write_text(
        json.dumps({"model": path.name, "sensitivities": sensitivities}, indent=1) + "\n"
    )
    print(sensitivities)


if __name__ == "__main__":
    main()
