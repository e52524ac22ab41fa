"""`fomoe replay` on small traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from fomoe.errors import ConfigError, TraceError
from fomoe.traces import Synthesis, TraceFacts, TraceWriter

Fomoe = Callable[..., Result]


def trace_at(path: Path, *, n_experts: int = 64) -> Path:
    facts = TraceFacts(
        model="m", n_layers=3, n_experts=n_experts, top_k=4, expert_bytes=(10, 10, 20)
    )
    with TraceWriter(path, facts) as writer:
        for passage, rows in Synthesis(facts=facts, texts=6, tokens=40, domains=2).passages():
            writer.append(passage, rows)
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace_at(tmp_path_factory.mktemp("replay") / "t")


def test_figures_as_json(fomoe: Fomoe, trace: Path) -> None:
    options = ("--policy", "lfru,price=0.05+lfru", "--capacity", "8,16", "--json", "--bounds")
    result = fomoe("replay", trace, *options)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert (figures["model"], figures["texts"]) == ("m", 6)
    assert figures["tokens_per_s"] > 0
    by_name: dict[tuple[str, int], Any] = {
        (each["policy"], each["capacity"]): each for each in figures["results"]
    }
    policies = (
        "lfru",
        "price=0.05+lfru",
        "lru",
        "belady",
    )  # exact ones bring what they are held to
    assert list(by_name) == [(policy, n) for n in (8, 16) for policy in policies]
    lfru, price = by_name["lfru", 8], by_name["price=0.05+lfru", 8]
    assert 0 < price["demand"] < lfru["demand"]
    assert set(lfru["by_domain"]) == {"synthetic-0", "synthetic-1"}
    assert len(lfru["by_layer"]) == 3
    assert by_name["belady", 8]["gap"]["share"] == 1
    assert lfru["gap"]["share_interval"][0] <= lfru["gap"]["share"]
    assert "gap" not in price
    assert "bounds" not in lfru
    bound = price["bounds"]["relaxed_optimum"]
    assert 0 <= bound["left_out"] <= price["left_out"]
    assert 0 <= bound["lost_squares"] <= price["lost_squares"]
    assert lfru["demand_bytes"] == pytest.approx(
        sum(
            4 * layer["demand"] * size
            for layer, size in zip(lfru["by_layer"], (10, 10, 20), strict=True)
        )
    )


def test_what_people_read(fomoe: Fomoe, trace: Path) -> None:
    result = fomoe("replay", trace, "--capacity", "8", "--warmup", 10)
    lines = result.output.splitlines()
    assert lines[0].split()[:3] == ["capacity", "policy", "demand"]
    assert [line.split()[1] for line in lines[1:4]] == ["lru", "lfru", "belady"]
    assert lines[-1].startswith("720 tokens in ")


@pytest.mark.parametrize(
    ("n_experts", "capacities"),
    [
        (96, [9, 16, 24]),
        (20, [4, 5]),  # no fewer than a token takes, and none of them twice
        (8, [4]),
    ],
)
def test_capacities_follow_the_model_unless_given(
    fomoe: Fomoe, tmp_path: Path, n_experts: int, capacities: list[int]
) -> None:
    path = trace_at(tmp_path / "t", n_experts=n_experts)
    result = fomoe("replay", path, "--policy", "car=0.5", "--json")
    assert result.exit_code == 0, result.output
    assert [each["capacity"] for each in json.loads(result.output)["results"]] == capacities


def test_lossy_policies_alone_need_nothing_to_be_held_to(fomoe: Fomoe, trace: Path) -> None:
    result = fomoe("replay", trace, "--capacity", "8", "--policy", "car=0.5", "--json")
    assert [each["policy"] for each in json.loads(result.output)["results"]] == ["car=0.5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--capacity", "many"), "write whole numbers"),
        (("--capacity", "3"), "capacity 3: m takes 4 of 64"),
        (("--policy", "best"), "'best' in policy 'best' is unknown"),
        (("--warmup", "40"), "lower --warmup"),
    ],
)
def test_wrong_options_are_refused(
    fomoe: Fomoe, trace: Path, options: tuple[str, ...], message: str
) -> None:
    result = fomoe("replay", trace, "--capacity", "8", *options)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_damaged_trace_is_refused(fomoe: Fomoe, trace: Path, tmp_path: Path) -> None:
    data = bytearray(trace.read_bytes())
    data[-1] ^= 1
    (tmp_path / "t").write_bytes(data)
    result = fomoe("replay", tmp_path / "t", "--capacity", "8")
    assert isinstance(result.exception, TraceError)
    assert "record 239 of 240 is damaged" in str(result.exception)


@pytest.mark.parametrize("verb", ["serve", "run", "bench"])
def test_traces_are_recorded_where_asked(
    fomoe: Fomoe, llm: Any, model: Path, tmp_path: Path, verb: str
) -> None:
    def refuse(self: Any) -> None:
        raise InterruptedError

    llm.prepare = refuse
    fomoe(verb, model, "--trace", tmp_path / "t", *(["--port", "0"] if verb == "serve" else []))
    assert llm.last.arguments["trace"] == tmp_path / "t"
    fomoe(verb, model, *(["--port", "0"] if verb == "serve" else []))
    assert llm.last.arguments["trace"] is None
