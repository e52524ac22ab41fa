"""Runs exact mode, policies and nulls over the same windows of text, paired token by token.

Exact and policy share what only the model and the text decide: the prompt is computed exactly in
every mode, then the document's own tokens are fed one by one while the mode acts on each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.evaluation.divergence import TokenScores, compare
from fomoe.evaluation.texts import Window

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

EXACT = "exact"
# Exact logits of a block of documents wait in memory for the other modes.
_BLOCK_BYTES = 2 << 30
_BATCH = 32  # rows that are compared together


@dataclass(frozen=True, slots=True)
class Mode:
    """A contract's text (`exact`, `car=0.35`, ...) and the share of weights that a null rounds."""

    spec: str = EXACT
    null_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What decode steps ran and read.

    Attributes:
        steps: Decode steps.
        activations: (layer, token, expert) triples that the router chose in them.
        reads: Activations that were read from the drive.
        substituted: Activations in which another expert ran.
        demand_bytes: Bytes read because a step needed them.
        background_bytes: Bytes read for experts that were wanted earlier.
        prefetch_bytes: Bytes read ahead of the router.
        shadow_bytes: Bytes read by shadow steps.
        logical_bytes: Bytes that the contract counts: what was not logically resident. A function
            of the text alone; 0 in exact mode, which counts none.
    """

    steps: int = 0
    activations: int = 0
    reads: int = 0
    substituted: int = 0
    demand_bytes: int = 0
    background_bytes: int = 0
    prefetch_bytes: int = 0
    shadow_bytes: int = 0
    logical_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Return both together."""
        names = [part.name for part in fields(Cost)]
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Runner(Protocol):
    """A model that can be told what to say."""

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""

    def force(self, window: Window, mode: Mode, on_row: Callable[[F32], None]) -> Cost:
        """Feed the window's forced tokens; `on_row` gets the logits [V] in place of each."""

    def free(self, prefix: list[int], tokens: int, mode: Mode) -> list[int]:
        """Return the greedy continuation of a prompt."""

    def likelihood(self, prefix: list[int], text: list[int]) -> F64:
        """Return -log p of each token of `text` after `prefix` in exact mode, float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One mode on one document; the scores are those of every forced token but the first."""

    document: str
    domain: str
    scores: TokenScores
    cost: Cost


@dataclass(frozen=True, slots=True, eq=False)
class FreeText:
    """A mode's own greedy continuation of one document's prefix.

    Attributes:
        document: The document's name.
        tokens: The text.
        nll: float64 [n], the text's surprise under exact mode.
    """

    document: str
    tokens: list[int]
    nll: F64


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """Runs by mode, each in the order of the documents.

    Attributes:
        runs: By contract's text, `exact` among them.
        nulls: The count-matched null of each policy.
        texts: Free-running texts by contract's text, empty where none were asked for.
    """

    runs: dict[str, list[Run]] = field(default_factory=dict)
    nulls: dict[str, list[Run]] = field(default_factory=dict)
    texts: dict[str, list[FreeText]] = field(default_factory=dict)


class _Kept:
    """Keeps a run's rows in an array [n, V]; the first row is not scored."""

    def __init__(self, rows: F32) -> None:
        self._rows, self._next = rows, -1

    def add(self, row: F32) -> None:
        """Take the next row."""
        if self._next >= 0:
            self._rows[self._next] = row
        self._next += 1


class _Scored:
    """Compares a run's rows with exact ones [n, V] as they come; the first row is not scored."""

    def __init__(self, exact: F32, targets: npt.NDArray[np.int64]) -> None:
        self._exact, self._targets = exact, targets
        self._batch: list[F32] = []
        self._parts: list[TokenScores] = []
        self._next, self._done = -1, 0

    def add(self, row: F32) -> None:
        """Take the next row."""
        if self._next >= 0:
            self._batch.append(row)
        self._next += 1
        if len(self._batch) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            part = slice(self._done, self._next)
            batch = np.stack(self._batch)
            self._parts.append(compare(self._exact[part], batch, self._targets[part]))
            self._done, self._batch = self._next, []

    def scores(self) -> TokenScores:
        """Return the scores of all rows."""
        self._flush()
        return TokenScores.joined(self._parts)


def closed_loop(
    runner: Runner,
    windows: Sequence[Window],
    policies: Sequence[str],
    *,
    null: bool,
    on_run: Callable[[], None],
) -> Results:
    """Run every mode over every window.

    Documents go in blocks of two or more, and a block through one mode after the other, so that
    whatever a run finds in the tiers was left there by another document, in every mode.

    Args:
        runner: The model.
        windows: All of one length, two or more.
        policies: Contracts' texts.
        null: Whether each policy gets a count-matched null.
        on_run: Called after each run.
    """
    results = Results()
    length = len(windows[0].forced)
    size = max(1, _BLOCK_BYTES // (length * runner.vocab * 4))
    for block in _blocks(windows, size):
        exact = np.empty((len(block), length - 1, runner.vocab), np.float32)
        results.runs.setdefault(EXACT, []).extend(_exact(runner, block, exact, on_run))
        for spec in policies:
            modes = [Mode(spec)] * len(block)
            own = _against(runner, block, modes, exact, on_run)
            results.runs.setdefault(spec, []).extend(own)
            if null:
                modes = [Mode(EXACT, _share(run.cost)) for run in own]
                nulls = _against(runner, block, modes, exact, on_run)
                results.nulls.setdefault(spec, []).extend(nulls)
    return results


def _blocks(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    """Split windows into blocks of about `size`, each of two or more."""
    count = max(1, min(-(-len(windows) // size), len(windows) // 2))
    for part in np.array_split(np.arange(len(windows)), count):
        yield [windows[i] for i in part]


def free_running(
    runner: Runner,
    windows: Sequence[Window],
    policies: Sequence[str],
    tokens: int,
    on_run: Callable[[], None],
) -> dict[str, list[FreeText]]:
    """Return each mode's greedy continuation of every window's prefix, scored in exact mode."""
    texts: dict[str, list[FreeText]] = {}
    for spec in (EXACT, *policies):
        found = texts.setdefault(spec, [])
        for window in windows:
            text = runner.free(window.prefix, tokens, Mode(spec))
            found.append(FreeText(window.document, text, runner.likelihood(window.prefix, text)))
            on_run()
    return texts


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading tokens two texts share."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def _exact(
    runner: Runner, block: Sequence[Window], exact: F32, on_run: Callable[[], None]
) -> list[Run]:
    """Run exact mode over a block and keep its rows in `exact` [documents, n, V]."""
    runs = []
    for window, rows in zip(block, exact, strict=True):
        cost = runner.force(window, Mode(), _Kept(rows).add)
        runs.append(
            Run(window.document, window.domain, compare(rows, rows, _targets(window)), cost)
        )
        on_run()
    return runs


def _against(
    runner: Runner,
    block: Sequence[Window],
    modes: Sequence[Mode],
    exact: F32,
    on_run: Callable[[], None],
) -> list[Run]:
    """Run a mode over a block and compare it with the exact rows [documents, n, V]."""
    runs = []
    for window, mode, rows in zip(block, modes, exact, strict=True):
        scored = _Scored(rows, _targets(window))
        cost = runner.force(window, mode, scored.add)
        runs.append(Run(window.document, window.domain, scored.scores(), cost))
        on_run()
    return runs


def _targets(window: Window) -> npt.NDArray[np.int64]:
    return np.array(window.forced[1:], np.int64)


def _share(cost: Cost) -> float:
    return cost.substituted / cost.activations if cost.activations else 0.0
