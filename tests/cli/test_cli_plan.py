import json
import re
from dataclasses import replace

import pytest
from support.tiny_gguf import write_tiny
from typer.testing import CliRunner

from fomoe.cli.main import make_app
from fomoe.errors import ConfigError
from fomoe.traces import Synthesis, TraceFacts, TraceWriter


def run(*arguments):
    return CliRunner().invoke(make_app(), ["plan", *arguments], catch_exceptions=False)


@pytest.mark.parametrize("machine", ["desktop", "original-1gpu", "rtx3060-64gb", "two-desktops"])
def test_a_model_without_a_file_is_planned_on_every_machine(machine):
    result = run("--shape", "397b-a17b", "--machine", machine, "--json")
    figures = json.loads(result.output)
    said = figures["predicted"]
    speed = said["tokens_per_s"]
    assert 2 < speed["low"] < speed["mid"] < speed["high"] < 30
    assert set(said["prompt_s"]) == {"512", "4096"}
    assert said["binds"] in {"drive", "link", "device", "memory"}
    assert sum(said["hits"][tier]["mid"] for tier in ("device", "ram", "nvme")) == pytest.approx(1)
    assert "32 GB more RAM" in said["upgrades_tokens_per_s"]


def test_every_line_with_a_figure_of_the_twin_says_predicted_and_its_range():
    lines = run("--shape", "397b-a17b").output.splitlines()
    for line in lines:
        if re.match("decode|hits|binds|prompt|upgrade", line):
            assert "predicted" in line
            assert re.search(r"\(.+ to .+\)", line)
    assert sum("predicted" in line for line in lines) >= 8


def test_cache_aware_routing_reads_less_and_is_faster():
    exact, car = (
        json.loads(run("--shape", "397b-a17b", "--car", car, "--json").output)["predicted"]
        for car in ("0", "0.35")
    )
    assert car["hits"]["nvme"]["mid"] < 0.5 * exact["hits"]["nvme"]["mid"]
    assert car["tokens_per_s"]["mid"] > 1.2 * exact["tokens_per_s"]["mid"]


def test_a_price_reads_less_than_exact_routing():
    exact, priced = (
        json.loads(run("--shape", "397b-a17b", "--price", price, "--json").output)["predicted"]
        for price in ("0", "0.05")
    )
    assert priced["hits"]["nvme"]["mid"] < 0.8 * exact["hits"]["nvme"]["mid"]
    assert "--price 0.05" in run("--shape", "397b-a17b", "--price", "0.05").output


def test_a_recorded_text_gives_the_hit_rates(tmp_path):
    facts = TraceFacts(
        model="m", n_layers=60, n_experts=512, top_k=10, expert_bytes=(7_602_176,) * 60
    )
    path = tmp_path / "text.trace"
    passages = Synthesis(facts=facts, tokens=220, sharpness=1.2, seed=4).passages()
    with TraceWriter(path, facts) as writer:
        for passage, rows in passages:
            writer.append(passage, rows)
    said = json.loads(run("--shape", "397b-a17b", "--trace", str(path), "--json").output)
    assert said["predicted"]["hits"]["device"]["mid"] == pytest.approx(0.6, abs=0.05)
    with pytest.raises(ConfigError, match=r"\(60, 512, 10\) there and \(48, 256, 8\) here"):
        run("--shape", "122b-a10b", "--trace", str(path))


def written(path, facts, passages):
    with TraceWriter(path, facts) as writer:
        for passage, rows in passages:
            writer.append(passage, rows)
    return str(path)


def test_interleaved_texts_are_planned_one_after_the_other(tmp_path):
    facts = TraceFacts(
        model="m", n_layers=60, n_experts=512, top_k=10, expert_bytes=(7_602_176,) * 60
    )
    one, two = (
        [(replace(passage, sequence=number), rows) for passage, rows in
         Synthesis(facts=facts, tokens=220, sharpness=1.2, seed=number).passages()]
        for number in range(2)
    )  # fmt: skip
    singly = [
        (passage.part(i, i + 1), rows.part(i, i + 1))
        for pair in zip(one, two, strict=True)
        for i in range(len(pair[0][0].tokens))
        for passage, rows in pair
    ]
    said = [
        json.loads(run("--shape", "397b-a17b", "--trace", trace, "--json").output)["predicted"]
        for trace in (
            written(tmp_path / "apart", facts, [*one, *two]),
            written(tmp_path / "mixed", facts, singly),
        )
    ]
    assert said[0] == said[1]


def test_a_trace_of_another_top_k_is_refused(tmp_path):
    facts = TraceFacts(model="m", n_layers=60, n_experts=512, top_k=8, expert_bytes=(7,) * 60)
    trace = written(tmp_path / "t", facts, [])
    with pytest.raises(ConfigError, match=r"\(60, 512, 8\) there and \(60, 512, 10\)"):
        run("--shape", "397b-a17b", "--trace", trace)


def test_a_file_is_planned_from_its_header(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    figures = json.loads(run(str(path), "--json").output)
    assert figures["predicted"]["hits"]["device"]["mid"] == 1
    assert figures["fit"]["ram_slots"] == 0


def test_budgets_stand_for_a_smaller_machine():
    small = json.loads(
        run("--shape", "35b-a3b", "--vram-budget", "2GB", "--ram-budget", "1GB", "--json").output
    )
    whole = json.loads(run("--shape", "35b-a3b", "--json").output)
    assert small["fit"]["device_slots"] < 0.3 * whole["fit"]["device_slots"]
    assert small["predicted"]["hits"]["nvme"]["mid"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one of them"),
        (("--shape", "397b-a17b", "--car", "0.3", "--price", "0.1"), "one of them"),
        (("x.gguf", "--shape", "397b-a17b"), "one of them"),
        (("--shape", "1t"), "397b-a17b"),
        (("--shape", "397b-a17b", "--machine", "phone"), "desktop"),
        (("--shape", "397b-a17b", "--ctx-size", "900000"), "bytes needed"),
    ],
)
def test_refuses_what_makes_no_sense(arguments, said):
    with pytest.raises(ConfigError, match=said):
        run(*arguments)


@pytest.mark.parametrize("option", ["--car", "--price"])
def test_a_strength_is_a_share(option):
    assert run("--shape", "397b-a17b", option, "1.5").exit_code == 2


def test_the_calibration_table_lists_rows_constants_and_sources(monkeypatch):
    from fomoe.cli import plan as module
    from fomoe.sim.calibration import RowResult, read_calibration

    def instead(calibration):
        return [
            RowResult(row=row, predicted=(1.0, 1.1, 1.2) if row.device >= 0 else None,
                      replayed=(1.0, 1.3), shares=(0.6, 0.1, 0.3, 0.0), guessed=(1.4, 1.5))
            for row in calibration.rows
        ]  # fmt: skip

    monkeypatch.setattr(module, "calibrate", instead)
    lines = run("--calibration").output.splitlines()
    for row in read_calibration().rows:
        assert any(line.startswith(f"row {row.name}: ") for line in lines)
        (line,) = (line for line in lines if line.startswith(row.name))
        assert "predicted" in line
        assert "(1.40 at 0.1 to 1.50 at 0.85)" in line
    for row in json.loads(run("--calibration", "--json").output)["rows"]:
        assert set(row) == {"row", "predicted"}
        assert row["predicted"]["replayed"] == [1.0, 1.3]
    assert any(line.startswith("constant desktop.drive0.rate: ") for line in lines)
    assert any(line.startswith("constant fitted.layer_s: ") for line in lines)


def test_what_is_asked_for_wins_over_a_variable(monkeypatch, tmp_path):
    path = write_tiny(tmp_path / "m.gguf")
    monkeypatch.setenv("FOMOE_MODEL", str(path))
    assert json.loads(run("--shape", "35b-a3b", "--json").output)["model"] == "35b-a3b"
    assert json.loads(run("--json").output)["model"] != "35b-a3b"
    with pytest.raises(ConfigError, match="one of them"):
        run(str(tmp_path / "other.gguf"), "--shape", "35b-a3b")


def test_prompts_that_the_context_cannot_hold_are_not_predicted():
    figures = json.loads(run("--shape", "35b-a3b", "--ctx-size", "1000", "--json").output)
    assert set(figures["predicted"]["prompt_s"]) == {"512"}
