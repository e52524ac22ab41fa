from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_gguf import write_tiny

from fomoe.cli.options import ModelOptions
from fomoe.cli.show import summarise
from fomoe.errors import BudgetError, DeviceError, GGUFError

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
MODEL = VECTORS / "wide_q4_k_m.gguf"


def test_the_sums_agree() -> None:
    summary = summarise(ModelOptions(model=MODEL), free_bytes=1 << 40)
    experts = summary.layers * summary.experts_per_layer
    assert summary.file_bytes == MODEL.stat().st_size
    assert summary.dense_bytes + summary.expert_bytes == sum(summary.type_bytes.values())
    assert sum(summary.type_bytes.values()) < summary.file_bytes
    assert sum(layers for _, layers in summary.expert_sizes) == summary.layers
    sizes = sum(n_bytes * layers for n_bytes, layers in summary.expert_sizes)
    assert sizes * summary.experts_per_layer == summary.expert_bytes
    assert summary.tiers["device"].experts == experts
    assert summary.tiers["nvme"].experts == 0


def test_budgets_spread_the_experts_over_the_tiers(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf")
    budget = 4 << 20
    options = ModelOptions(model=model, devices="cpu,cpu", vram_budget=budget, ram_budget=budget)
    summary = summarise(options, free_bytes=1 << 40)
    assert summary.devices == ["cpu", "cpu"]
    assert 0 < summary.tiers["device"].slot_bytes <= 2 * budget
    assert 0 < summary.tiers["ram"].slot_bytes <= budget
    held = sum(share.experts for share in summary.tiers.values())
    assert held == summary.layers * summary.experts_per_layer
    with pytest.raises(BudgetError, match=r"at least [0-9,]+ bytes needed"):
        summarise(ModelOptions(model=model, vram_budget=1, ram_budget=0), free_bytes=0)


def test_a_gpu_with_a_budget_need_not_be_there(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf")
    options = ModelOptions(model=model, devices="cuda:7", vram_budget=1 << 30, ram_budget=1 << 28)
    summary = summarise(options, free_bytes=1 << 40)
    assert summary.vram_budget == 1 << 30
    assert summary.tiers["device"].experts == summary.layers * summary.experts_per_layer
    with pytest.raises(DeviceError, match="cuda:7"):
        summarise(ModelOptions(model=model, devices="cuda:7"), free_bytes=1 << 40)


def test_the_verb_prints_a_table_or_json(fomoe: Callable[..., Any]) -> None:
    as_json = json.loads(fomoe("show", MODEL, "--json").stdout)
    assert as_json["architecture"] == "qwen35moe"
    assert as_json["tiers"]["device"]["experts"] > 0
    table = fomoe("show", MODEL, env={"COLUMNS": "200"}).stdout
    assert f"{as_json['parameters']:,} parameters" in table
    assert "in nvme" in table


def test_a_file_that_is_no_model_is_refused(fomoe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    assert isinstance(fomoe("show", tmp_path / "empty.gguf").exception, GGUFError)
