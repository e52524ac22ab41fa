"""The closed loop over a model whose modes are known shifts of its logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe.errors import ConfigError
from fomoe.evaluation import closed_loop as module
from fomoe.evaluation.closed_loop import (
    EXACT,
    Cost,
    Mode,
    Results,
    closed_loop,
    first_difference,
    free_running,
)
from fomoe.evaluation.divergence import compare, negative_log_likelihoods
from fomoe.evaluation.summary import pareto_point, read_bytes, summarise, total_cost
from fomoe.evaluation.texts import Window
from fomoe.evaluation.tokens import TokenTable

VOCAB, PREFIX, SCORED = 40, 3, 130


class ShiftedModel:
    """A policy moves the logits by its size, a null by a hundredth of its share; all counted."""

    vocab = VOCAB

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mode]] = []

    def rows(self, tokens: list[int], mode: Mode) -> np.ndarray:
        rows = np.stack([self._noise(tokens[: i + 1], 0) * 3 for i in range(len(tokens))])
        size = 0.0 if mode.spec == EXACT else float(mode.spec.partition("=")[2])
        size += mode.null_share / 100
        shift = np.stack([self._noise(tokens[: i + 1], 1) for i in range(len(tokens))])
        rows[PREFIX:] += size * shift[PREFIX:]  # the prompt is exact
        return rows.astype(np.float32)

    def _noise(self, tokens: list[int], salt: int) -> np.ndarray:
        return np.random.default_rng([salt, *tokens[-3:]]).standard_normal(VOCAB)

    def force(self, window: Window, mode: Mode, on_row: Callable[[Any], None]) -> Cost:
        self.asked.append((window.document, mode))
        rows = self.rows(window.prefix + window.forced[:-1], mode)[PREFIX - 1 :]
        for row in rows:
            on_row(row)
        substituted = 0 if mode.spec == EXACT else 50 + len(self.asked)
        return Cost(
            steps=SCORED, activations=SCORED * 8, reads=7, substituted=substituted,
            demand_bytes=1000, prefetch_bytes=10, shadow_bytes=100,
        )  # fmt: skip

    def free(self, prefix: list[int], tokens: int, mode: Mode) -> list[int]:
        text: list[int] = []
        for _ in range(tokens):
            text.append(int(self.rows(prefix + text, mode)[-1].argmax()))
        return text

    def likelihood(self, prefix: list[int], text: list[int]) -> np.ndarray:
        rows = self.rows(prefix + text, Mode())[len(prefix) - 1 : -1]
        return negative_log_likelihoods(rows, np.array(text))


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    rng = np.random.default_rng(0)
    return [
        Window(f"d{i}", "ab"[i % 2], rng.integers(0, VOCAB, PREFIX).tolist(),
               rng.integers(0, VOCAB, SCORED + 1).tolist())
        for i in range(5)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def results(windows: list[Window]) -> Results:
    return closed_loop(
        ShiftedModel(), windows, ["car=0.5", "car=0.1"], null=True, on_run=lambda: None
    )


def test_every_scored_token_is_that_of_the_definition(
    results: Results, windows: list[Window]
) -> None:
    model = ShiftedModel()
    for spec in (EXACT, "car=0.5", "car=0.1"):
        for window, run in zip(windows, results.runs[spec], strict=True):
            text = window.prefix + window.forced
            exact, policy = (model.rows(text, mode)[PREFIX:-1] for mode in (Mode(), Mode(spec)))
            want = compare(exact, policy, np.array(text[PREFIX + 1 :]))
            for name in ("exact_nll", "policy_nll", "kl", "agrees"):
                np.testing.assert_array_equal(getattr(run.scores, name), getattr(want, name))
            assert len(run.scores.kl) == SCORED
    assert not results.runs[EXACT][0].scores.kl.any()
    assert all(run.scores.kl.all() for run in results.runs["car=0.1"])


def test_the_null_touches_as_many_sites_as_the_policy(
    windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ShiftedModel()
    monkeypatch.setattr(module, "_BLOCK_BYTES", 0)
    results = closed_loop(model, windows, ["car=0.5"], null=True, on_run=lambda: None)
    nulls = [mode.null_share for _, mode in model.asked if mode.null_share]
    costs = [run.cost for run in results.runs["car=0.5"]]
    assert nulls == [cost.substituted / cost.activations for cost in costs]
    assert len(set(nulls)) == 5


def test_no_run_follows_one_of_the_same_document(
    windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 0)  # blocks of two and of three
    model, count = ShiftedModel(), 0

    def counted() -> None:
        nonlocal count
        count += 1

    small = closed_loop(model, windows, ["car=0.5"], null=False, on_run=counted)
    documents = [name for name, _ in model.asked]
    assert all(a != b for a, b in pairwise(documents))
    assert count == len(documents) == 10
    assert [run.document for run in small.runs["car=0.5"]] == ["d0", "d1", "d2", "d3", "d4"]


def test_figures_are_those_of_the_tokens(results: Results) -> None:
    figures = summarise(results, "car=0.5", baseline="car=0.1")
    runs = results.runs["car=0.5"]
    excess = np.concatenate([run.scores.excess for run in runs])
    kl = np.concatenate([run.scores.kl for run in runs])
    null = np.concatenate([run.scores.kl for run in results.nulls["car=0.5"]])
    assert figures.excess.mean == pytest.approx(excess.mean(), rel=1e-12)
    assert figures.median_excess == np.median(excess)
    assert (figures.excess.documents, figures.excess.tokens) == (5, 5 * SCORED)
    assert figures.kl_over_null is not None
    assert figures.kl_over_null.mean == pytest.approx((kl - null).mean(), rel=1e-9)
    assert set(figures.segments) == {"cold", "warm"}
    assert figures.segments["cold"].excess.tokens == 500
    warm = np.concatenate([run.scores.kl[100:] for run in runs])
    assert figures.segments["warm"].kl.mean == pytest.approx(warm.mean(), rel=1e-12)
    assert figures.ratio is not None
    assert figures.ratio.ours == figures.excess.mean
    assert figures.ratio.baseline == summarise(results, "car=0.1").excess.mean
    assert figures.drift is None
    assert summarise(results, "car=0.1", baseline="car=0.1").ratio is None


def test_domains_are_those_of_the_documents(results: Results) -> None:
    figures = summarise(results, "car=0.5", baseline="car=0.1")
    own = {"a": (0, 2, 4), "b": (1, 3)}
    means = {}
    for name, documents in own.items():
        runs = [results.runs["car=0.5"][i] for i in documents]
        part = figures.domains[name]
        means[name] = np.concatenate([run.scores.excess for run in runs]).mean()
        assert part.excess.documents == len(documents)
        assert part.excess.mean == pytest.approx(means[name], rel=1e-12)
    assert figures.worst is not None
    assert figures.worst.domain == max(means, key=lambda name: means[name])
    assert figures.worst.value == pytest.approx(max(means.values()), rel=1e-12)
    assert figures.worst.upper >= max(figures.worst.value, *figures.worst.uppers.values())
    small = summarise(results, "car=0.1", baseline="car=0.5")
    ratios = {name: small.domains[name].excess.mean / mean for name, mean in means.items()}
    assert small.worst_ratio is not None
    assert min(means.values()) > 0
    assert small.worst_ratio.value == pytest.approx(max(ratios.values()), rel=1e-9)


def test_costs_add_up_and_become_points(results: Results) -> None:
    cost = total_cost(results.runs["car=0.5"])
    assert (cost.steps, cost.reads, cost.demand_bytes) == (5 * SCORED, 35, 5000)
    read = read_bytes(cost)
    assert read.total == pytest.approx(5 * 1110 / (5 * SCORED))
    assert read.prefetch == pytest.approx(50 / (5 * SCORED))
    point = pareto_point("car=0.5", summarise(results, "car=0.5"))
    assert (point.name, point.series, point.documents) == ("car=0.5", "car", 5)
    assert point.excess.low <= point.excess.mean <= point.excess.high


def test_free_texts_are_scored_in_exact_mode(windows: list[Window]) -> None:
    texts = free_running(ShiftedModel(), windows, ["car=2.0"], 12, lambda: None)
    runs = closed_loop(ShiftedModel(), windows, ["car=2.0"], null=False, on_run=lambda: None)
    drift = summarise(Results(runs.runs, {}, texts), "car=2.0").drift
    assert drift is not None
    a, b = texts[EXACT], texts["car=2.0"]
    shared = [first_difference(x.tokens, y.tokens) for x, y in zip(a, b, strict=True)]
    assert drift.shared_tokens == np.mean(shared)
    assert drift.diverged == np.mean([n < 12 for n in shared]) > 0
    want = np.mean([y.nll.mean() - x.nll.mean() for x, y in zip(a, b, strict=True)])
    assert drift.excess.mean == pytest.approx(want, rel=1e-12)
    assert drift.excess.mean > 0  # exact mode's own greedy text is likelier than another's
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_tokens_survive_their_file_and_pair_only_with_the_same(
    results: Results, windows: list[Window], tmp_path: Path
) -> None:
    table = TokenTable.of(results, windows)
    table.save(tmp_path / "t.npz")
    again = TokenTable.load(tmp_path / "t.npz")
    assert set(again.columns) == set(table.columns) >= {"exact/nll", "car=0.1/null_kl"}
    shifted = TokenTable(
        again.documents, again.steps, again.targets,
        {"exact/nll": again.columns["exact/nll"] + 0.25},
    )  # fmt: skip
    assert shifted.excess_over(table).mean == pytest.approx(0.25)
    assert again.excess_over(table).high == 0.0
    other = TokenTable(again.documents, again.steps, again.targets[::-1], again.columns)
    with pytest.raises(ConfigError, match="differ in their targets"):
        other.excess_over(table)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    for name in ("broken.npz", "missing.npz"):
        with pytest.raises(ConfigError, match="not a table of scored tokens"):
            TokenTable.load(tmp_path / name)
