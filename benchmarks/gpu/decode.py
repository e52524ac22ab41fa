"""Decode and prompt speed of whole layers with everything resident on one device.

Run: python benchmarks/gpu/decode.py --device cuda:0 [--shape 397b-a17b --layers 4] [--out r.json]
     python benchmarks/gpu/decode.py --device cuda:0 --model bench/397b-a17b-4l.gguf

Without --model the two reference models are made in device memory, block by block the same as
`benchmarks/synth.py` writes them: random weights of the Q4_K_M mix, routing that spreads as real
routing does. Per model: milliseconds per token at a context of about 512, what that reads, as a
share of the copy bandwidth of the same run (bytes read and written), microseconds by launch, tokens
a second of prompts, growth of device memory over --steady tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.filling import Hosted, host_file, host_recipe
from synthetic.model_file import Recipe
from synthetic.shapes import SHAPES

from fomoe.kernels.gpu.gpu import GPU, open_gpu

REFERENCE = (("397b-a17b", 4), ("35b-a3b", 12))
COPY_BYTES = 1 << 30
ROUNDS = 5


def copy_bandwidth(gpu: GPU) -> float:
    """Bytes a second, read and written, of a plain copy inside the device's memory."""
    runtime, stream = gpu.runtime, gpu.stream
    source, to = runtime.alloc(COPY_BYTES), runtime.alloc(COPY_BYTES)
    first, last = runtime.event(timing=True), runtime.event(timing=True)
    best = 0.0
    for _ in range(ROUNDS):
        runtime.record(first, stream)
        runtime.copy(to, source, COPY_BYTES, stream)
        runtime.record(last, stream)
        runtime.synchronize(stream)
        best = max(best, 2 * COPY_BYTES / (1e-3 * runtime.elapsed_ms(first, last)))
    runtime.free(source)
    runtime.free(to)
    return best


def decode_times(hosted: Hosted, first: int, count: int) -> list[float]:
    """Seconds of each of `count` tokens from position `first` on, the host waiting for each."""
    times = []
    for position in range(first, first + count):
        start = time.perf_counter()
        hosted.model.decode(hosted.text(position), position)
        hosted.model.decoded()
        times.append(time.perf_counter() - start)
    return times


def prompt_time(hosted: Hosted, count: int) -> float:
    """Seconds that a prompt of `count` tokens takes at best, to its last token's logits."""
    tokens = np.array([hosted.text(i) for i in range(count)], np.int32)
    model, times = hosted.model, []
    for _ in range(ROUNDS):
        model.reset(0)
        start = time.perf_counter()
        for at in range(0, count, model.options.max_tokens):
            part = tokens[at : at + model.options.max_tokens]
            model.prefill(part, at)
        model.logits([len(part) - 1])
        times.append(time.perf_counter() - start)
    return min(times[1:])


def growth(hosted: Hosted, first: int, count: int) -> int:
    """Bytes of device memory that `count` tokens leave behind; positions turn round."""
    free = hosted.gpu.runtime.memory()[0]
    for step in range(count):
        position = first + step % 256
        hosted.model.decode(hosted.text(position), position)
        hosted.model.decoded()
    return free - hosted.gpu.runtime.memory()[0]


def waterfall(hosted: Hosted, position: int) -> dict[str, float]:
    """Microseconds per launch of each name, over the layers of a token."""
    sums: dict[str, list[float]] = defaultdict(list)
    for name, micros in hosted.model.time_launches(hosted.text(position), position):
        sums[name].append(micros)
    return {name: round(statistics.mean(all_of), 2) for name, all_of in sums.items()}


def measure(hosted: Hosted, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """All figures of one model."""
    prompts = {count: prompt_time(hosted, count) for count in args.prompts}
    hosted.prefill(args.context)
    decode_times(hosted, args.context, 16)
    times = decode_times(hosted, args.context, args.tokens)
    token_s = statistics.median(times)
    read = hosted.bytes_per_token
    return {
        "model": hosted.name,
        "layers": hosted.spec.n_layers,
        "launches per layer": hosted.model.launches_per_layer,
        "ms per token": round(1e3 * token_s, 4),
        "ms per token, mean": round(1e3 * statistics.mean(times), 4),
        "bytes per token": read,
        "share of copy bandwidth": round(read / token_s / bandwidth, 4),
        "us per launch": waterfall(hosted, args.context),
        "prompt tokens per s": {n: round(n / s) for n, s in prompts.items()},
        "bytes grown": growth(hosted, args.context, args.steady),
    }


def main() -> None:
    """Measure each model on the device; print one line each, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--model", type=Path, help="a GGUF file in place of synthetic blocks")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--steady", type=int, default=2000)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases: list[Any] = [args.model] if args.model else [
        Recipe(shape=SHAPES[name], layers=layers)
        for name, layers in ([(args.shape, args.layers)] if args.shape else REFERENCE)
    ]
    results: dict[str, Any] = {"models": []}
    for case in cases:
        start = time.monotonic()
        hosting = host_file if isinstance(case, Path) else host_recipe
        with hosting(args.device, case, args.chunk, graphs=not args.no_graphs) as hosted:
            bandwidth = copy_bandwidth(hosted.gpu)
            one = measure(hosted, args, bandwidth)
        results |= {"device": hosted.gpu.runtime.name, "target": hosted.gpu.runtime.target}
        results["copy GB/s"] = round(bandwidth / 1e9, 1)
        results["models"].append(one | {"seconds in all": round(time.monotonic() - start, 1)})
        print(json.dumps(one), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
