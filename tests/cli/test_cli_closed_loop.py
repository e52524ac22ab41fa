"""`fomoe eval quality` and `eval choices` over a model whose policies are a little worse."""

from __future__ import annotations

import json
import lzma
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fomoe.engine.requests import Receipt, TokenEvent
from fomoe.errors import ConfigError
from fomoe.evaluation.pareto import read_points
from fomoe.llm import Completion

LAYERS, TOP_K, VOCAB = 2, 4, 256


@pytest.fixture
def loop_llm(llm: Any, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    class LoopLLM(llm):  # type: ignore[misc]
        """The next byte is the likelier by e; a policy of strength s makes it e^(1 - s)."""

        spec = SimpleNamespace(vocab=VOCAB, n_layers=LAYERS, moe=SimpleNamespace(top_k=TOP_K))

        def _row(self, token: int, spec: str) -> np.ndarray:
            row = np.zeros(VOCAB, np.float32)
            row[(token + 1) % VOCAB] = 1.0 - (0.0 if spec == "exact" else float(spec.split("=")[1]))
            return row

        def force(
            self, prompt: list[int], tokens: list[int], on_token: Callable[[TokenEvent], None],
            *, quality: str, null_share: float = 0.0, logits: bool = False, logprobs: int = -1,
        ) -> Receipt:  # fmt: skip
            asked.append((quality, null_share))
            fed = [prompt[-1], *tokens[:-1]]
            for i, (before, token) in enumerate(zip(fed, tokens, strict=True)):
                row = self._row(before, quality if i else "exact")
                logprob = float(row[token] - math.log(np.exp(row.astype(float)).sum()))
                best = int(row.argmax())
                on_token(
                    TokenEvent(
                        request_id="r", token=token, logprob=logprob,
                        top=[(best, logprob)] if logprobs > 0 else [],
                        logits=row.tobytes() if logits else b"",
                    )
                )  # fmt: skip
            steps = len(tokens) - 1
            return Receipt(
                generated_tokens=len(tokens), reads_nvme=steps,
                nvme_bytes=(50 + 10) * steps + 1000, prompt_bytes=1000, prefetch_bytes=10 * steps,
                substituted=0 if quality == "exact" else 2 * steps,
            )  # fmt: skip

        def generate(self, prompt: list[int], *, max_tokens: int, **_: Any) -> Completion:
            ids = [(prompt[-1] + 1 + i) % VOCAB for i in range(max_tokens)]
            return Completion("", ids, "length", Receipt())

    asked: list[tuple[str, float]] = []
    LoopLLM.asked = asked
    monkeypatch.setattr(sys.modules["fomoe.llm"], "LLM", LoopLLM)
    return LoopLLM


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    documents = ["".join(chr(97 + (i * j) % 26) for j in range(60)) for i in range(1, 25)]
    path.write_text("<|endoftext|>".join(documents))
    return path


QUALITY = ("--prefix", 20, "--scored", 30, "--part", "all")


def test_quality_prints_and_keeps_what_it_measured(
    fomoe: Callable[..., Any], loop_llm: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    arguments = ("eval", "quality", model, "--text", text, *QUALITY, "--documents", 4)
    policies = ("--policy", "car=0.5, price=0.25", "--baseline", "car=0.50", "--free", 5)
    result = fomoe(*arguments, *policies, "--output", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((out / "figures.json").read_text()) == report
    assert set(report["policies"]) == {"car=0.5", "price=0.25"}
    car = report["policies"]["car=0.5"]
    assert car["excess"]["documents"] == 4
    assert car["excess"]["tokens"] == 4 * 30
    assert report["policies"]["price=0.25"]["ratio"]["baseline"] == car["excess"]["mean"]
    assert car["ratio"] is None
    # p(next) = e / (e + 255) against sqrt(e) / (sqrt(e) + 255); the others alike.
    p, q = math.e / (math.e + 255), math.sqrt(math.e) / (math.sqrt(math.e) + 255)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert car["kl"]["mean"] == pytest.approx(kl, rel=1e-6)
    assert car["drift"]["diverged"] == 0.0
    assert car["cost"]["demand_bytes"] == 4 * 30 * 50
    assert report["exact"]["cost"]["activations"] == 4 * 30 * LAYERS * TOP_K
    nulls = [share for quality, share in loop_llm.asked if share]
    assert nulls == [2 / (LAYERS * TOP_K)] * 8
    points = read_points(out / "pareto.json")
    assert [(p.name, p.read.total) for p in points] == [
        ("model", 60.0), ("car=0.5", 60.0), ("price=0.25", 60.0),
    ]  # fmt: skip
    assert {p.name for p in out.iterdir()} == {
        "figures.json", "pareto.json", "pareto.png", "pareto.svg", "tokens.npz",
    }  # fmt: skip
    assert loop_llm.last.arguments["routing"].shadow_every == 0
    shown = fomoe(*arguments, *policies).stdout
    for part in ("car=0.5", "4 documents, 120 scored tokens", "cold", "one-sided bound"):
        assert part in shown


def test_figures_are_kept_and_shown_where_nothing_can_be_drawn(
    fomoe: Callable[..., Any], loop_llm: Any, model: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = fomoe("eval", "quality", model, "--text", text, *QUALITY, "--output", tmp_path / "o")
    assert isinstance(result.exception, ConfigError)
    assert "plots need matplotlib" in str(result.exception)
    assert "24 documents, 720 scored tokens" in result.stdout
    assert (tmp_path / "o" / "figures.json").exists()


def test_another_file_is_set_against_the_reference(
    fomoe: Callable[..., Any], loop_llm: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ("eval", "quality", "--text", text, *QUALITY)
    assert fomoe(*arguments, model, "--policy", "car=0.5", "--output", first).exit_code == 0
    small = tmp_path / "small-Q2_K.gguf"
    small.touch()
    again = fomoe(*arguments, small, "--reference", first, "--output", second)
    assert again.exit_code == 0, again.output
    names = [point.name for point in read_points(second / "pareto.json")]
    assert names == ["model", "car=0.5", "small-Q2_K"]
    assert "small-Q2_K in exact mode, against the reference: ΔNLL +0.0000" in again.stdout
    third = fomoe(*arguments, model, "--points", second / "pareto.json", "--output", tmp_path / "c")
    assert third.exit_code == 0, third.output
    names = [point.name for point in read_points(tmp_path / "c" / "pareto.json")]
    assert names == ["model", "car=0.5", "small-Q2_K"]  # exact mode's point is the same: once
    other = fomoe(*arguments, small, "--reference", first, "--documents", 3)
    assert isinstance(other.exception, ConfigError)
    assert "differ in their documents" in str(other.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "car=7"), "must lie"),
        (("--policy", "exact"), "always run"),
        (("--policy", "car=0.5", "--baseline", "car=0.4"), "must be one of"),
        (("--scored", 90), "documents have 111 tokens"),
        (("--reference", "/nonexistent"), "not a table"),
        (("--output", "/dev/null/x"), "cannot be made"),
        (("--text", "/nonexistent"), "cannot be read"),
        (("--quality", "car=0.5"), "named with --policy"),
        (("--car", 0.5), "named with --policy"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    fomoe: Callable[..., Any], loop_llm: Any, model: Path, text: Path,
    arguments: tuple[Any, ...], message: str,
) -> None:  # fmt: skip
    result = fomoe("eval", "quality", model, "--text", text, *QUALITY, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_choices_pairs_each_set_by_question(
    fomoe: Callable[..., Any], loop_llm: Any, model: Path, tmp_path: Path
) -> None:
    # In alphabetical order is likely: "bcd" after any query beats "xzx".
    rows = [{"query": f"question {i}", "choices": ["xzx", "bcd"], "gold": 1} for i in range(9)]
    packed, plain = tmp_path / "mc.jsonl.xz", tmp_path / "words.jsonl"
    packed.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    lines = (json.dumps({"text": f"say\u2028 {i} ! !"}, ensure_ascii=False) for i in range(4))
    plain.write_text("\n".join(lines))
    arguments = (
        "eval", "choices", model, "--data", packed, "--data", plain, "--policy", "car=0.9",
        "--part", "all",
    )  # fmt: skip
    result = fomoe(*arguments, "--json", "--questions", 5)
    assert result.exit_code == 0, result.output
    sets = json.loads(result.stdout)["sets"]
    choice = sets["mc.jsonl.xz"]["car=0.9"]["accuracy"]
    assert (choice["questions"], choice["exact"], choice["policy"]) == (5, 1.0, 1.0)
    assert sets["words.jsonl"]["car=0.9"]["accuracy"]["questions"] == 4
    change = sets["mc.jsonl.xz"]["car=0.9"]["gold_change"]["mean"]
    # " bcd": the space is no successor, b neither; c and d are, and less so under the policy.
    norm = [math.log(math.exp(x) + 255) for x in (1.0, 0.1)]
    assert change == pytest.approx(2 * (0.1 - norm[1] - 1.0 + norm[0]) + 2 * (norm[0] - norm[1]),
                                   rel=1e-5)  # fmt: skip
    assert "mc.jsonl.xz" in fomoe(*arguments).stdout


def test_choices_refuses_what_is_no_set(
    fomoe: Callable[..., Any], loop_llm: Any, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl.xz"
    broken.write_bytes(b"no archive")
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "a b"}))
    two, same = tmp_path / "two.jsonl", tmp_path / "other" / "two.jsonl"
    same.parent.mkdir()
    for path in (two, same):
        path.write_text("\n".join(json.dumps({"text": f"a {i} b"}) for i in range(3)))
    for path, more, message in (
        (broken, (), "broken.jsonl.xz: cannot be read"),
        (one, (), "2 are needed"),
        (two, ("--data", same), "two sets are called two.jsonl"),
        (two, ("--quality", "car=0.5"), "named with --policy"),
    ):
        result = fomoe("eval", "choices", model, "--data", path, "--part", "all", *more)
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)
