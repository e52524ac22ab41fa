"""Whether a device computes what the CPU does: logits, greedy text, and memory left behind.

Run: export PYTHONPATH=. OPENBLAS_NUM_THREADS=2  # threads of each of the processes
     python benchmarks/gpu/exactness.py --device cuda:0 [--out r.json]
     python benchmarks/gpu/exactness.py --device hip:0 --tiny  # emulated

Wants the `gguf` package. Small models of every type that GPUs know, golden vectors among them:
512 positions token by token and as prompts, float32 activations against the float64 reference with
the tolerances of `tests/model/test_golden.py`, int8 against the CPU's path. The bundled model: 20
texts of 200 tokens, greedy, against the CPU's path: equal with float32 activations; with int8, as
close as the CPU's path to itself under the noise of float32 sums. Memory: growth over 2,000 tokens,
and what processes leave that are killed while they decode. Models run side by side in processes of
their own. The last line is JSON; the status is 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where `reference` and `support` lie

import exact_memory
from exact_models import cases, compare
from exact_texts import PROMPTS, compare_texts
from support.emulated_gpu import install_standin

LIMIT_S = 540.0
LEAST_EQUAL = 0.9  # of the texts, with float32 activations
MOST_MISREAD = 2.0  # times the control's tokens, with int8 activations


def main() -> int:
    """Compare everything, print a table and JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a bit of everything, emulated")
    parser.add_argument("--jobs", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.tiny:
        install_standin()
    start = time.monotonic()
    results: dict[str, Any] = {
        "device": args.device, "emulated": args.tiny, **_compared(args),
    }  # fmt: skip
    results["memory"] = _memory(args)
    results["seconds"] = round(time.monotonic() - start, 1)
    results["broken"] = [*_broken(results)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    return 1 if results["broken"] else 0


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    """Run models and texts side by side; print and return what they come to, failures as well."""
    count, prompts = (6, 1) if args.tiny else (200, len(PROMPTS))
    spawn = multiprocessing.get_context("spawn")
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.jobs, spawn, _prepare, (args.tiny,)) as pool,
    ):
        texts = {
            f"texts, int8={int8}": pool.submit(
                compare_texts, args.device, count, prompts, int8=int8
            )
            for int8 in (True, False)
        }
        models = {
            case.name: pool.submit(compare, case, Path(folder))
            for case in cases(args.device, tiny=args.tiny)
        }
        failed: dict[str, str] = {}
        found = {
            key: _results(jobs, start, failed, show)
            for key, jobs, show in (("models", models, _show_model), ("texts", texts, _show_text))
        }
    return {**found, "failed": failed}


def _prepare(emulated: bool) -> None:
    if emulated:
        install_standin()


def _results(
    jobs: dict[str, Future[dict[str, Any]]], start: float, failed: dict[str, str], show: Any
) -> list[dict[str, Any]]:
    """Print and return the results of jobs in their order, and note what failed."""
    found = []
    for name, job in jobs.items():
        result = _result(job, max(1.0, LIMIT_S - (time.monotonic() - start)))
        if isinstance(result, str):
            failed[name] = result
            print(f"{name}: FAILED, {result}", flush=True)
        else:
            found.append(result)
            show(result)
    return found


def _result(job: Future[dict[str, Any]], within_s: float) -> dict[str, Any] | str:
    """Return a job's result, or what it failed of: the table is to show all the others."""
    try:
        return job.result(within_s)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _show_model(result: dict[str, Any]) -> None:
    if result["refused"]:
        print(f"{result['model']:18} refused: {result['refused']}", flush=True)
    for row in result["rows"]:
        print(
            f"{row['model']:18} {row['mode']:14} {row['way']:14} {row['figure']:16} "
            f"{row['value']:9.2e} bound {row['bound']:7.1e} positions {row['positions']:4} "
            f"{'ok' if row['passed'] else 'BROKEN'}",
            flush=True,
        )


def _show_text(result: dict[str, Any]) -> None:
    print(
        f"{result['texts']} texts of {result['tokens']} tokens, {result['activations']}: "
        f"{result['equal texts']} equal, decisions of {result['equal decisions']}; read otherwise "
        f"{result['read otherwise']}, margin up to {result['largest margin read otherwise']:.3g}; "
        f"the CPU with noise: {result['control: equal texts']} equal, read otherwise "
        f"{result['control: read otherwise']}"
    )
    for part in result["parts"]:
        print(
            f"  text {part['prompt']}: other token at {part['token']} (the CPU's margin "
            f"{part['margin']:.3g}), other decision at {part['decision']}",
            flush=True,
        )


def _memory(args: argparse.Namespace) -> dict[str, Any]:
    tokens, rounds = (70, 1) if args.tiny else (2000, 3)
    found = {
        "growth": exact_memory.growth(args.device, tokens),
        "killed": exact_memory.killed(args.device, rounds, emulated=args.tiny),
    }
    print(json.dumps(found), flush=True)
    return found


def _texts_hold(text: dict[str, Any]) -> bool:
    if text["activations"] == "float32":
        return bool(text["equal texts"] >= LEAST_EQUAL * text["texts"])
    most = MOST_MISREAD * max(1, text["control: read otherwise"])
    return bool(text["read otherwise"] <= most)


def _broken(results: dict[str, Any]) -> list[str]:
    """Return what does not hold."""
    rows = [row for model in results["models"] for row in model["rows"]]
    found = [
        f"{row['model']}, {row['mode']}, {row['way']}: {row['figure']} {row['value']:.3g}"
        for row in rows
        if not row["passed"] and row["way"] != "CPU"
    ]
    found += [f"texts: {text}" for text in results["texts"] if not _texts_hold(text)]
    memory = results["memory"]
    if memory["growth"]["bytes grown"] > 0:
        found.append(f"{memory['growth']['bytes grown']} bytes grown")
    found += [
        f"killed: {kill}"
        for kill in memory["killed"]
        if kill["bytes left"]
        or not kill["killed while decoding"]
        or (kill["bytes held"] <= 0 and not results["emulated"])
    ]
    return [*found, *results["failed"]]


if __name__ == "__main__":
    sys.exit(main())
