"""Puts the results of `vs_llama_cpp.py` into the README, between two comment lines.

Run: python benchmarks/readme_table.py [--check]. With `--check` nothing is written and the exit
status says whether the README is up to date. Running it twice changes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from versus.items import ITEMS
from versus.settings import Settings

HERE = Path(__file__).parent
BEGIN, END = "<!-- speed: benchmarks/readme_table.py -->", "<!-- end of speed -->"


def table(results: list[dict[str, Any]]) -> str:
    """Return the Markdown table of results, in the order of the items, and what they depend on."""
    order = list(ITEMS)
    results = sorted(results, key=lambda data: order.index(data["item"]["name"]))
    lines = [
        "| work | fomoe tok/s | llama.cpp tok/s | ratio | llama.cpp's best settings |",
        "| --- | --- | --- | --- | --- |",
    ]
    for data in results:
        ours, theirs = data["fomoe"]["tokens_per_s"], data["llama"]["tokens_per_s"]
        settings = Settings(**data["llama_settings"]).text()
        lines.append(
            f"| {data['item']['title']} | {ours:,.1f} | {theirs:,.1f} | "
            f"{data['ratio']:.2f} | {settings} |"
        )
    return "\n".join([*lines, "", *_notes(results)])


def _notes(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines under the table: machine, versions, how often."""
    if not results:
        return ["No results yet."]
    machines = sorted({f"{d['machine']['cpu']}, {d['machine']['cores']} cores" for d in results})
    versions = sorted({d["llama_info"]["version"] for d in results})
    threads = sorted({str(d["threads"]) for d in results})
    pairs = min(len(d["pair_ratios"]) for d in results)
    return [
        f"Medians of {pairs} and more alternating pairs on {' and '.join(machines)}, "
        f"{' or '.join(threads)} threads; llama-cpp-python {' and '.join(versions)}, native build. "
        "Shapes are true, weights and routing synthetic (`benchmarks/synth.py`); every run, "
        "setting and recipe is in `benchmarks/results`."
    ]


def insert(readme: str, text: str) -> str:
    """Return the README with `text` between the comment lines; ValueError where they are not."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of the known items."""
    paths = (folder / f"{name}.json" for name in ITEMS)
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def main() -> None:
    """Update or check the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    args = parser.parse_args()
    old = args.readme.read_text()
    new = insert(old, table(read_results(args.results)))
    if args.check:
        if new != old:
            sys.exit("the README's table is out of date: python benchmarks/readme_table.py")
    elif new != old:
        args.readme.write_text(new)


if __name__ == "__main__":
    main()
