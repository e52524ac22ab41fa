from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_gguf import write_tiny

from fomoe import config
from fomoe.cli import main
from fomoe.cli.opening import demo_budgets, llm_arguments
from fomoe.cli.options import EngineOptions, ModelOptions, ServerOptions
from fomoe.config import EngineConfig
from fomoe.engine.plan import make_plan
from fomoe.errors import ConfigError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec

LOGITS = ("--tokens", "1,2", "--output")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the place of the bundled one."""
    monkeypatch.setattr(config, "__file__", str(tmp_path / "fomoe" / "config.py"))
    path = tmp_path / "models" / config.BUNDLED_MODEL
    path.parent.mkdir()
    return write_tiny(path)


def test_options_reach_the_model(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path
) -> None:
    result = fomoe(
        "logits", model, *LOGITS, tmp_path / "x.npy", "--devices", "cpu,cpu:1",
        "--vram-budget", "1.5MiB", "--ram-budget", "2MB", "--ctx-size", 99, "--car", 0.6,
        "--car-capacity", 7, "--threads", 3, "--kv-dtype", "f32", "--activations", "f32",
        "--ram-policy", "inclusive", "--no-prefetch", "--prefetch-depth", 2,
        "--prefetch-budget", 0.1, "--serial", "--prefill-chunk", 5,
        "--transport", "tcp", "--address", "box:6379", "--profile", "f.freq",
        "--backfill", "28/60", "--warmup", 256, "--logical-eviction", "lru",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert llm.last.path == model
    assert llm.last.arguments == {
        "devices": ["cpu", "cpu:1"],
        "attention": "auto",
        "vram_budget": 3 << 19,
        "ram_budget": 2_000_000,
        "routing": config.RoutingConfig(
            quality="car=0.6", car_capacity=7, backfill="28/60", warmup=256, logical_eviction="lru"
        ),
        "profile": Path("f.freq"),
        "ctx_size": 99,
        "threads": 3,
        "kv_dtype": "f32",
        "activations": "f32",
        "ram_policy": "inclusive",
        "prefetch": False,
        "prefetch_depth": 2,
        "prefetch_budget": 0.1,
        "cpu_arm": "off",
        "overlap": False,
        "prefill_chunk": 5,
        "transport": "tcp",
        "address": "box:6379",
    }
    assert not llm.last.is_open


def test_options_left_out_are_the_configuration_s_own(model: Path) -> None:
    arguments = llm_arguments(ModelOptions(model=model), EngineOptions())
    defaults = EngineConfig(model=model)
    assert arguments.pop("devices") == list(defaults.devices)
    assert arguments.pop("vram_budget") is arguments.pop("ram_budget") is None
    assert arguments.pop("address") is None
    assert arguments == {name: getattr(defaults, name) for name in arguments}


def test_variables_stand_in_for_options(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path
) -> None:
    variables = {"FOMOE_DEVICES": "cpu,cpu", "FOMOE_RAM_BUDGET": "1K", "FOMOE_CTX_SIZE": "77"}
    given = ("--ctx-size", "88")
    result = fomoe("logits", model, *LOGITS, tmp_path / "x.npy", *given, env=variables)
    assert result.exit_code == 0, result.output
    assert llm.last.arguments["devices"] == ["cpu", "cpu"]
    assert llm.last.arguments["ram_budget"] == 1024
    assert llm.last.arguments["ctx_size"] == 88
    text = tmp_path / "text"
    text.write_text("some text")
    fomoe("eval", "ppl", model, "--text", text, "--ctx", "4", env=variables)
    assert llm.last.arguments["devices"] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vram-budget", "4XB"), "'4XB' is not a size"),
        (("--kv-dtype", "bf16"), "'bf16' is not one of"),
        (("--ctx-size", "many"), "Invalid value for '--ctx-size'"),
        (("--frobnicate",), "No such option"),
    ],
)
def test_a_wrong_option_is_refused(
    fomoe: Callable[..., Any], llm: Any, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = fomoe("logits", model, *LOGITS, "x.npy", *arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_our_own_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fomoe", "logits", "m.gguf", *LOGITS, "/no/such/dir/x.npy"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: /no/such/dir is no directory; make it or choose another --output\n"
    )


def test_the_bundled_model_gets_a_third_and_a_sixth(bundled: Path) -> None:
    arguments = llm_arguments(ModelOptions(), EngineOptions())
    assert arguments["devices"] == ["cpu", "cpu"]
    file = open_gguf(bundled)
    spec, table = read_spec(file), ExpertTable.from_gguf(file)
    budgets = config.Budgets(vram_bytes=arguments["vram_budget"], ram_bytes=arguments["ram_budget"])
    run = EngineConfig(model=bundled, budgets=budgets)
    topology = make_plan(table, spec, run, (0, 0)).topology
    experts = spec.n_layers * spec.moe.n_experts
    assert sum(topology.device_slots.values()) == pytest.approx(experts / 3, rel=0.1)
    assert sum(topology.ram_slots.values()) == pytest.approx(experts / 6, rel=0.1)


def test_a_budget_or_another_model_turns_the_demonstration_off(bundled: Path) -> None:
    by_path = llm_arguments(ModelOptions(model=bundled), EngineOptions())
    table = ExpertTable.from_gguf(open_gguf(bundled))
    assert (by_path["vram_budget"], by_path["ram_budget"]) == demo_budgets(table, 2)
    given = llm_arguments(ModelOptions(vram_budget=1 << 20), EngineOptions())
    assert (given["vram_budget"], given["ram_budget"]) == (1 << 20, None)
    one = llm_arguments(ModelOptions(devices="cpu"), EngineOptions())
    assert one["vram_budget"] == demo_budgets(table, 1)[0]
    other = ModelOptions(model=bundled.rename(bundled.with_name("other.gguf")))
    assert llm_arguments(other, EngineOptions())["vram_budget"] is None
    assert other.device_names() == ("cpu",)


def test_the_key_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    options = ServerOptions(host="0.0.0.0", api_key_file=file)
    assert options.config().api_key == "secret"
    with pytest.raises(ConfigError, match="keep one"):
        ServerOptions(api_key="x", api_key_file=file).config()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerOptions(api_key_file=tmp_path / "none").config()
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        ServerOptions(api_key_file=file).config()


def test_version_and_help(fomoe: Callable[..., Any]) -> None:
    assert fomoe("--help").exit_code == 0
    for verb in ("serve", "run", "show", "logits", "stop", "eval"):
        assert verb in fomoe("--help").output
        assert fomoe(verb, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "quality"),
    [
        ((), "exact"),
        (("--quality", "kl=1e-2"), "kl=0.01"),
        (("--quality", "bytes=0.5GB/token"), "bytes=500MB/token"),
        (("--car", "0.35"), "car=0.35"),
        (("--car", "0"), "exact"),
    ],
)
def test_contracts_reach_the_model(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path,
    arguments: tuple[str, ...], quality: str,
) -> None:  # fmt: skip
    result = fomoe("logits", model, *LOGITS, tmp_path / "x.npy", *arguments)
    assert result.exit_code == 0, result.output
    routing = llm.last.arguments["routing"]
    assert str(routing.quality) == quality


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quality", "best"), "write exact, kl=0.01"),
        (("--quality", "kl=0"), "from 1e-06 to 10"),
        (("--car", "1.5"), "between 0 (exact) and 1"),
        (("--car", "0.5", "--quality", "exact"), "give one of the two"),
    ],
)
def test_wrong_contracts_are_refused(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    result = fomoe("logits", model, *LOGITS, tmp_path / "x.npy", *arguments)
    assert result.exit_code != 0
    said = f"{result.output} {result.exception}".replace("│", " ")
    assert message in " ".join(said.split())
