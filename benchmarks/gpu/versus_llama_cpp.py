"""One GPU, one file, both engines in turn: decode and prompts of fomoe over llama.cpp's CUDA build.

Run: python benchmarks/gpu/versus_llama_cpp.py --llama ./llama_cpp --models a.gguf b.gguf

`llama_cpp` is `llama_cpp.cpp` of this folder, built against a llama.cpp tree; `benchmarks/synth.py`
writes the files. llama.cpp's best of flash attention on and off and of two batch sizes counts.
A ratio above 1 says that fomoe is faster. Every round runs both, the medians of the rounds count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 300


def llama_times(binary: Path, model: Path, prompts: list[int], tokens: int) -> dict[str, float]:
    """Return the best milliseconds of a decoded token and of each prompt."""
    sizes = ",".join(map(str, prompts))
    done = subprocess.run([binary, model, "3", sizes, str(tokens)], capture_output=True, text=True,
                          timeout=TIMEOUT_S, check=True)  # fmt: skip
    best: dict[str, float] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            what = "decode" if "decode" in row else str(row["prompt"])
            best[what] = min(best.get(what, float("inf")), row["ms"])
    return best


def fomoe_times(model: Path, prompts: list[int], args: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of a decoded token and of each prompt, by `decode.py`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, HERE / "decode.py", "--device", args.device, "--model", model,
                   "--prompts", *map(str, prompts), "--tokens", str(args.tokens), "--steady", "0",
                   "--out", out.name]  # fmt: skip
        subprocess.run(command, timeout=TIMEOUT_S, check=True, stdout=sys.stderr)
        found = json.loads(Path(out.name).read_text())["models"][0]
    speeds = found["prompt tokens per s"]
    times = {str(n): 1e3 * n / speeds[str(n)] for n in prompts}
    return times | {"decode": found["ms per token"]}


def compare(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run both engines in turn on one file."""
    rounds = []
    for _ in range(args.rounds):
        theirs = llama_times(args.llama, model, args.prompts, args.tokens)
        rounds.append({"llama.cpp": theirs, "fomoe": fomoe_times(model, args.prompts, args)})
    ratios = {}
    for what in rounds[0]["fomoe"]:
        each = {engine: [one[engine][what] for one in rounds] for engine in rounds[0]}
        middle = {engine: statistics.median(times) for engine, times in each.items()}
        ratios[what] = round(middle["llama.cpp"] / middle["fomoe"], 3)
        print(f"{model.stem} {what}: fomoe {middle['fomoe']:.3f} ms, llama.cpp "
              f"{middle['llama.cpp']:.3f} ms, ratio {ratios[what]}", flush=True)  # fmt: skip
    return {"model": model.name, "rounds": rounds, "ratio": ratios}


def main() -> None:
    """Compare on every file; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = [compare(model, args) for model in args.models]
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
