"""Runs both engines on one item, alternately, on the same ids."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from versus.cgroup import MemoryLimit, drop_caches
from versus.disk import direct_rates, read_ahead
from versus.engine import Engine, Launch, fomoe_launch, llama_launch
from versus.items import Item
from versus.quiet import Others
from versus.settings import Settings, Trial, knobs, search

_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Setup:
    """What holds for a whole session; `fomoe` are arguments of `LLM`."""

    venv: Path
    threads: int
    pairs: int
    fomoe: dict[str, Any]
    overhead_bytes: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything measured of one item; a run is what an engine's runner answered."""

    fomoe: list[dict[str, Any]]
    llama: list[dict[str, Any]]
    best: Settings
    trials: list[Trial]
    llama_info: dict[str, Any]
    fomoe_info: dict[str, Any]
    limits: dict[str, Any]


class Duel:
    """Both engines on one item."""

    def __init__(self, item: Item, model: Path, ids: int, setup: Setup) -> None:
        self._item, self._model, self._ids, self._setup = item, model, ids, setup
        self._llama_info: dict[str, Any] = {}
        self._fomoe_info: dict[str, Any] = {}
        self._limit_bytes: int | None = setup.memory_bytes
        if self._limit_bytes is None and item.memory_share is not None:
            self._limit_bytes = int(model.stat().st_size * item.memory_share)

    def search(self) -> tuple[Settings, list[Trial]]:
        """Return llama.cpp's best settings and all that were tried."""
        item, limited = self._item, self._limit_bytes is not None
        varied = knobs(0 if item.decode else item.prompt, limited=limited)
        return search(Settings(repack=not limited), varied, self._trial)

    def run(self, best: Settings, trials: list[Trial]) -> Outcome:
        """Run the pairs; llama.cpp with the settings that `search` found."""
        rates: list[dict[str, float]] = []
        pairs = self._pairs(best, rates)
        limits: dict[str, Any] = {}
        if self._limit_bytes is not None:
            limits = {
                "memory_bytes": self._limit_bytes,
                "expert_bytes": self._expert_bytes(),
                "direct": {name: median(rate[name] for rate in rates) for name in rates[0]},
            }
        fomoe, llama = ([pair[i] for pair in pairs] for i in (0, 1))
        return Outcome(fomoe, llama, best, trials, self._llama_info, self._fomoe_info, limits)

    def _trial(self, settings: Settings) -> float:
        """Milliseconds of one setting; under a limit fewer decoded tokens, which may be very slow.

        A prompt stays whole: how it is cut into batches is one of the settings.
        """
        item = self._item
        if self._limit_bytes is not None and item.decode:
            item = replace(item, prompt=max(1, item.prompt // 2), decode=item.decode // 4)
        return self._timed(self._once(item, settings, 1))

    def _pairs(
        self, best: Settings, rates: list[dict[str, float]]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Run the pairs; with a limit the drive's own speed goes into `rates` before each."""
        pairs = []
        for n in range(1, self._setup.pairs + 1):
            if self._limit_bytes is not None:
                rates.append(direct_rates(self._model))
            runs: dict[str, dict[str, Any]] = {}
            for name in ("fomoe", "llama") if n % 2 else ("llama", "fomoe"):
                runs[name] = self._once(self._item, best if name == "llama" else None, n)
            pairs.append((runs["fomoe"], runs["llama"]))
            ours, theirs = self._timed(runs["fomoe"]), self._timed(runs["llama"])
            company = " and ".join(str(run["others_cores"]) for run in pairs[-1])
            print(
                f"  pair {n}: fomoe {ours:,.1f} ms, llama.cpp {theirs:,.1f} ms, "
                f"{theirs / ours:.3f} (others used {company} cores)",
                flush=True,
            )
        return pairs

    def _once(self, item: Item, settings: Settings | None, n: int) -> dict[str, Any]:
        """Start an engine that has the machine to itself and time it; None means fomoe.

        In memory: the median of a few texts after one to warm up. With a memory limit: one text,
        from a cold page cache.
        """
        with ExitStack() as stack:
            limit = None
            if self._limit_bytes is not None:
                drop_caches()
                limit = stack.enter_context(MemoryLimit(self._limit_bytes))
                ahead = None if settings is None else settings.read_ahead_kib
                stack.enter_context(read_ahead(self._model, ahead))
            engine = stack.enter_context(Engine(self._launch(settings, limit)))
            self._load(engine, settings)
            if limit is None:
                texts = range(n * (_REPEATS + 1), (n + 1) * (_REPEATS + 1))
                runs = [_run(engine, item, each, self._ids) for each in texts]
                return sorted(runs[1:], key=self._timed)[_REPEATS // 2]
            run = _run(engine, item, n, self._ids)
            return run | {"peak_bytes": limit.peak_bytes(), "held_bytes": limit.held_bytes()}

    def _launch(self, settings: Settings | None, limit: MemoryLimit | None) -> Launch:
        if settings is None:
            return fomoe_launch(limit)
        return llama_launch(self._setup.venv, settings.environment(), limit)

    def _budget(self) -> dict[str, int]:
        """Give fomoe's expert slots what the limit leaves after dense weights and processes."""
        if self._limit_bytes is None:
            return {}
        dense = self._model.stat().st_size - self._expert_bytes()
        return {"vram_budget": self._limit_bytes - dense - self._setup.overhead_bytes}

    def _expert_bytes(self) -> int:
        """Return the bytes of all routed experts: what a sweep reads at most."""
        file = open_gguf(self._model)
        spec = read_spec(file)
        table = ExpertTable.from_gguf(file, spec.n_layers)
        return sum(table.expert_bytes(i) for i in range(spec.n_layers)) * spec.moe.n_experts

    def _load(self, engine: Engine, settings: Settings | None) -> None:
        arguments = {
            "path": str(self._model),
            "threads": self._setup.threads,
            "ctx": self._item.ctx,
        }
        if settings is not None:
            self._llama_info = engine.call("load", settings=settings.runner(), **arguments)
            return
        options = self._setup.fomoe | self._budget()
        info = engine.call("load", settings=options, **arguments)
        self._fomoe_info = info | {"settings": options}

    def _timed(self, run: dict[str, Any]) -> float:
        return float(run["decode_ms" if self._item.decode else "prompt_ms"])


def _run(engine: Engine, item: Item, n: int, ids: int) -> dict[str, Any]:
    """Time the n-th text: another stretch of the recipe's ids, so that no prompt is known."""
    length = item.prompt + item.decode + 1
    first = n * length % max(1, ids - length)
    others = Others(engine.pid)
    run = engine.call("run", first=first, prompt=item.prompt, decode=item.decode)
    return run | {"others_cores": others.cores()}
