"""fomoe against llama.cpp: the same file, ids, threads and memory, alternately.

Run: python benchmarks/vs_llama_cpp.py --models DIR [--items 35b-decode,...] [--pairs 5]
     [--venv DIR] [--threads 2] [--fomoe '{"prefill_chunk": 256}'] [--memory-limit BYTES]

For each item llama.cpp's settings are searched first and printed with their times; then the pairs
run. A ratio of 1.0 and up means that fomoe is faster. `synth.py` writes the models. Items with a
memory limit need root and a cgroup memory controller. The last line is JSON; each result goes to
`benchmarks/results/<item>.json`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from versus.duel import Duel, Setup
from versus.items import ITEMS
from versus.report import result, text
from versus.settings import Settings, Trial, ensure_llama

from fomoe.config import default_model, parse_bytes
from fomoe.gguf.reader import open_gguf

RESULTS = Path(__file__).parent / "results"
DEFAULT_VENV = Path.home() / ".cache" / "fomoe-benchmarks" / "llama.cpp"


def text_ids(model: Path) -> tuple[int, dict[str, Any]]:
    """Return how many ids the benchmark's text may use, and the model's recipe ({}: bundled)."""
    path = model.with_suffix(".json")
    if path.exists():
        recipe: dict[str, Any] = json.loads(path.read_text())
        return int(recipe["text"]["ids"]), recipe
    return open_gguf(model).tensor("token_embd.weight").shape[0], {}


def found_before(path: Path) -> tuple[Settings, list[Trial]]:
    """Return the settings and trials of an earlier result."""
    data = json.loads(path.read_text())
    trials = [
        Trial(Settings(**trial["settings"]), trial["ms"], trial["failure"])
        for trial in data["llama_trials"]
    ]
    return Settings(**data["llama_settings"]), trials


def compare(name: str, setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Run one item and write its result."""
    item, path = ITEMS[name], args.out / f"{name}.json"
    model = default_model() if item.model is None else args.models / item.model
    ids, recipe = text_ids(model)
    duel = Duel(item, model, ids, setup)
    print(f"{item.title}: settings of llama.cpp", flush=True)
    best, trials = found_before(path) if args.reuse and path.exists() else duel.search()
    print(f"  best: {best.text()}", flush=True)
    data = result(item, duel.run(best, trials), recipe, setup.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(text(data), flush=True)
    return data


def main() -> None:
    """Run the items that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("bench"))
    parser.add_argument("--items", default=",".join(ITEMS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV)
    parser.add_argument("--fomoe", type=json.loads, default={}, help="arguments of LLM, JSON")
    parser.add_argument("--memory-limit", type=parse_bytes, help="in place of the items' shares")
    parser.add_argument(
        "--overhead", type=parse_bytes, default=parse_bytes("1.4GiB"),
        help="of the limit, what fomoe's processes take beside weights",
    )  # fmt: skip
    parser.add_argument(
        "--reuse", action="store_true", help="the settings of an earlier result, where there is one"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = args.items.split(",")
    if unknown := set(names) - set(ITEMS):
        parser.error(f"unknown items {sorted(unknown)}; there are {', '.join(ITEMS)}")
    # So that a stop from outside ends the engines and gives the drive its read-ahead back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ensure_llama(args.venv)
    setup = Setup(args.venv, args.threads, args.pairs, args.fomoe, args.overhead, args.memory_limit)
    results = [compare(name, setup, args) for name in names]
    print(json.dumps({data["item"]["name"]: data["ratio"] for data in results}))


if __name__ == "__main__":
    main()
