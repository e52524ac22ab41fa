"""The lab, in one command: train a model, tune on tuning text, score the rest, write the tables.

    python tools/lab_model/run.py corpus.txt.xz tokenizer.json wiki.test.raw out/ --seed 1

Writes `tallies.npz` (every arm, by window), `lab.json` and, with --quantiser, the quants' points.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import train as trainer
from arms import LEVELS, PRICES, THRESHOLDS, Arms, at_levels, caches, measure_sensitivities, run_all
from closed_loop import Arm, Bench, Tally
from contract import hold
from decode import LabDecoder
from quants import MIXTURES, Rounder, apply
from texts import (
    Windows,
    cut,
    domain_of,
    join,
    part_of,
    read_documents,
    wikitext_articles,
)
from tokenizers import Tokenizer

PREFIX, LENGTH = 256, 448
LONG = 1024  # windows of the contract, whose controller needs a few hundred tokens
KL_TARGET, TWIN_EVERY = 0.01, 16
PARTS = ("levels", "tables", "contract", "quants")
SHORT_OF = 0.99  # our reads are aimed just below the baseline's


class Lab:
    """One seed's model and what was measured on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.monotonic()
        self.tokenizer = Tokenizer.from_file(str(args.tokenizer))
        self.facts: dict[str, object] = {"seed": args.seed}
        self.tallies: dict[str, Tally] = {}
        self.arms = Arms(args.capacity)
        self.most = args.arms

    @property
    def is_trained(self) -> bool:
        """Whether an earlier run left the model."""
        return self.args.weights is not None and self.args.weights.exists()

    def say(self, text: str) -> None:
        """Print with the seconds so far."""
        print(f"[{time.monotonic() - self.began:5.0f}] {text}", flush=True)

    def left(self) -> float:
        """Seconds of the time limit that are left."""
        return self.args.seconds - (time.monotonic() - self.began)

    def read(self) -> None:
        """Read, split and cut the texts."""
        parts: dict[str, dict[str, list[str]]] = {}
        for text in read_documents(self.args.corpus):
            parts.setdefault(part_of(text), {}).setdefault(domain_of(text), []).append(text)
        training = [text for texts in parts["train"].values() for text in texts]
        self.text = np.zeros(0, np.uint16)
        if not self.is_trained:
            self.text = trainer.encode(training, self.tokenizer)
        parts["score"]["wikitext"] = wikitext_articles(self.args.wikitext)
        a = self.args
        self.tune = self.windows(parts["tune"], a.window, a.tune)
        self.score = self.windows(parts["score"], a.window, a.score)
        self.long = {
            part: self.windows(parts[part], a.long, a.contract) for part in ("tune", "score")
        }
        self.say(f"{len(self.text):,} training tokens, {len(self.score.ids)} windows to score")

    def windows(self, texts: dict[str, list[str]], length: int, most: int) -> Windows:
        """Cut each domain's documents."""
        return join(
            [cut(docs, name, self.tokenizer, length, most) for name, docs in sorted(texts.items())]
        )

    def train(self) -> None:
        """Train the model and freeze it, rounded as the reference file would be."""
        weights, vocab = self.args.weights, self.tokenizer.get_vocab_size()
        if self.is_trained:
            model = trainer.restore(weights, vocab, self.args)
        else:
            model = trainer.train(self.text, vocab, self.args)
            if weights is not None:  # whole or not at all: another run may wait for it
                torch.save(model.state_dict(), weights.with_suffix(".part"))
                weights.with_suffix(".part").rename(weights)
        self.decoder = LabDecoder(model.eval())
        config = self.decoder.config
        self.facts |= {
            "activations": config.num_hidden_layers * config.num_experts_per_tok,
            "expert_parameters": 3 * config.moe_intermediate_size * config.hidden_size,
            "scored_steps": self.args.window - self.args.prefix - 1,
        }
        del model
        if self.args.quantiser is not None:
            self.full = self.copy_weights()
            self.rounder = Rounder(self.args.quantiser, self.args.threads)
            apply(self.decoder, MIXTURES[0], self.rounder)
        self.say("trained")

    def copy_weights(self) -> list[dict[str, object]]:
        """Keep the unrounded weights for the smaller mixtures."""
        kept = [{"embed": self.decoder.embed, "head": self.decoder.head}]
        for layer in self.decoder.layers:
            row = {n: getattr(layer, n) for n in ("gate_up", "down", "shared_weights")}
            kept.append(row | {"mixer": dict(vars(layer.mixer))})
        return kept

    def restore_weights(self) -> None:
        """Put the unrounded weights back."""
        top, *layers = self.full
        vars(self.decoder).update(top)
        for layer, row in zip(self.decoder.layers, layers, strict=True):
            mixer = row["mixer"]
            vars(layer.mixer).update(mixer)
            vars(layer).update({n: v for n, v in row.items() if n != "mixer"})

    def bench(self, windows: Windows, kinds: list[str], wanted: np.ndarray | None = None) -> Bench:
        """Open windows and run their prefixes."""
        bench = Bench(self.decoder, windows.ids, self.args.prefix, self.args.threads)
        bench.prefill([self.arms.kinds[kind] for kind in kinds], wanted)
        return bench

    def tune_constants(self) -> None:
        """Fix sensitivities, and each rule's constant at each level, on tuning text."""
        bench = self.bench(self.tune, ["lru", "lfru", "mass"])
        arms = self.arms
        arms.sensitivities = measure_sensitivities(bench, arms, self.most * 3)
        self.facts["sensitivities"] = arms.sensitivities
        self.say(f"sensitivities {[round(s, 2) for s in arms.sensitivities]}")
        grids = {
            "car": ([arms.car(x) for x in THRESHOLDS], THRESHOLDS),
            "car lfru": ([arms.car(x, "lfru") for x in THRESHOLDS], THRESHOLDS),
            "price": ([arms.price(x) for x in PRICES], PRICES),
        }
        self.constants: dict[str, list[float | None]] = {}
        for name, (grid, values) in grids.items():
            seen = run_all(bench, arms.exact, grid, self.most * 3, self.say)
            short = SHORT_OF if name == "price" else 1.0
            levels = [level * short for level in self.args.levels]
            found = at_levels(values, [seen[a.name] for a in grid], levels)
            self.constants[name] = found
        self.facts["levels"], self.facts["constants"] = self.args.levels, self.constants
        self.say(f"constants {self.constants}")

    def score_levels(self) -> None:
        """Run the level arms and the tables' arms on the text that is scored."""
        kinds = ["lru", "lfru", "mass", "backfill"]
        arms = self.arms
        config = self.decoder.config
        shape = config.num_hidden_layers, config.num_experts_per_tok
        wanted = np.zeros((*self.score.ids.shape, *shape), np.uint8)
        self.scored = bench = self.bench(self.score, kinds, wanted)
        names = ("lru", "lfru", "mass")
        exact = [Arm(f"exact {n}", arms.exact.rule, arms.kinds[n]) for n in names]
        self.tallies |= bench.run(exact, wanted=wanted)
        self.save_wanted(wanted)
        self.tallies["exact"] = self.tallies["exact lru"]
        self.say(f"exact ppl {np.exp(self.tallies['exact'].nll.mean()):.3f}")
        jobs: list[Arm] = []
        if "levels" in self.args.parts:
            c = self.constants
            jobs += [arms.price(x) for x in c["price"] if x is not None]
            jobs += [arms.car(x) for x in c["car"] if x is not None]
            jobs += [arms.car(x, "lfru") for x in c["car lfru"] if x is not None]
        tables = [
            arms.car(0.60, "backfill"), arms.car(0.35, "backfill"),
            arms.car(0.35, "backfill", renormalise=True), arms.car(0.35), arms.car(0.60),
            arms.car(0.60, "lfru", renormalise=True), arms.plain_price(0.05, 0.0),
            arms.plain_price(0.08), arms.plain_price(0.03), arms.drop(0.10),
        ]  # fmt: skip
        if "tables" in self.args.parts:
            jobs += tables
        for start in range(0, len(jobs), self.most):
            if self.left() < self.args.reserve:
                self.say(f"no time for {[a.name for a in jobs[start:]]}")
                break
            part = jobs[start : start + self.most]
            self.tallies |= run_all(bench, arms.exact, part, self.most, self.say)
            self.save()

    def score_quants(self) -> None:
        """Run the smaller mixtures exactly, in the memory of the reference mixture."""
        if self.args.quantiser is None:
            return
        n_layers = len(self.decoder.layers)
        reference = MIXTURES[0].expert_bits(n_layers)
        rows: dict[str, object] = {}
        del self.scored
        for mixture in MIXTURES[1:]:
            bits = mixture.expert_bits(n_layers)
            capacity = int(self.args.capacity * reference / bits)
            self.restore_weights()
            apply(self.decoder, mixture, self.rounder)
            kinds = caches(capacity)
            bench = Bench(self.decoder, self.score.ids, self.args.prefix, self.args.threads)
            bench.prefill([kinds["lru"], kinds["mass"]])
            arms = [Arm(f"{mixture.name} {n}", self.arms.exact.rule, kinds[n]) for n in
                    ("lru", "mass")]  # fmt: skip
            self.tallies |= bench.run(arms)
            rows[mixture.name] = {"bits": bits, "capacity": capacity, "reference_bits": reference}
            self.say(f"{mixture.name}: {rows[mixture.name]}")
        self.facts["quants"] = rows
        self.restore_weights()
        apply(self.decoder, MIXTURES[0], self.rounder)
        self.save()

    def score_contract(self) -> None:
        """Hold a KL contract: its one constant on tuning text, its figures on the rest."""
        factor = 1.0
        for part in ("tune", "score"):
            windows = self.long[part]
            bench = self.bench(windows, ["lru", "mass"])
            policy = self.arms.price(0.0)
            held = hold(bench, self.arms.exact, policy, KL_TARGET / factor, TWIN_EVERY)
            row = {
                "target": KL_TARGET / factor,
                "kl": float(held.kl.mean()),
                "kl_by_eighth": [float(x.mean()) for x in np.array_split(held.kl, 8, 1)],
                "sampled": float(held.sampled.mean()),
                "exact_reads": float(held.exact_reads.mean()),
                "demand": float(held.demand.mean()),
                "shadow": float(held.shadow.mean()),
                "excess": float((held.nll - held.exact_nll).mean()),
                "tokens": int(held.kl.size),
                "final_price": [float(x) for x in np.quantile(held.price, [0.05, 0.5, 0.95])],
            }
            self.facts[f"contract_{part}"] = row
            self.say(f"contract {part}: {row}")
            factor = max(1.0, row["kl"] / max(row["sampled"], 1e-9))
        self.facts["contract_factor"] = factor
        self.save()

    def save(self) -> None:
        """Write what there is."""
        out = self.args.output
        out.mkdir(parents=True, exist_ok=True)
        tag = f"-{self.args.seed}"
        arrays = {f"{n}|{k}": v.astype(np.float32) for n, t in self.tallies.items()
                  for k, v in asdict(t).items()}  # fmt: skip
        np.savez_compressed(
            out / f"tallies{tag}.npz",
            documents=self.score.documents,
            domains=np.array(self.score.domains),
            **arrays,
        )
        (out / f"lab{tag}.json").write_text(json.dumps(self.facts, indent=1))

    def save_wanted(self, wanted: np.ndarray) -> None:
        """Write the exact run's experts of some windows, for offline policies."""
        rows = np.linspace(0, len(wanted) - 1, min(self.args.traced, len(wanted))).astype(int)
        self.args.output.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            self.args.output / f"wanted-{self.args.seed}.npz",
            wanted=wanted[rows],
            prefix=self.args.prefix,
            documents=self.score.documents[rows],
            domains=np.array(self.score.domains)[rows],
        )


def arguments() -> argparse.Namespace:
    """Command line: the trainer's, and what is scored."""
    parser = trainer.options(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("wikitext", type=Path, help="WikiText-2's raw test set")
    parser.add_argument("output", type=Path)
    parser.add_argument("--prefix", type=int, default=PREFIX)
    parser.add_argument("--window", type=int, default=LENGTH)
    parser.add_argument("--long", type=int, default=LONG)
    parser.add_argument("--tune", type=int, default=128, help="tuning windows per domain")
    parser.add_argument("--score", type=int, default=320, help="scored windows per domain")
    parser.add_argument("--contract", type=int, default=16, help="long windows per domain")
    parser.add_argument("--traced", type=int, default=240, help="windows whose experts are kept")
    parser.add_argument("--capacity", type=int, default=21)
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is scored")
    parser.add_argument("--weights", type=Path, help="take the model from here, or leave it here")
    parser.add_argument("--arms", type=int, default=6, help="arms of a scoring pass")
    parser.add_argument("--threads", type=int, default=14)
    parser.add_argument("--quantiser", type=Path, help="llama.cpp's libggml-base.so")
    parser.add_argument("--seconds", type=float, default=1e9, help="leave arms out after this")
    parser.add_argument("--reserve", type=float, default=0.0, help="seconds kept for the rest")
    return parser.parse_args()


def main() -> None:
    """Do everything in order; what is most wanted comes first."""
    args = arguments()
    lab = Lab(args)
    lab.read()
    lab.train()
    with torch.no_grad():
        if {"levels", "contract"} & set(args.parts):
            lab.tune_constants()
        lab.score_levels()
        if "contract" in args.parts:
            lab.score_contract()
        if "quants" in args.parts:
            lab.score_quants()
    lab.say("done")


if __name__ == "__main__":
    main()
