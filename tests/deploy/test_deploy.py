"""Everything under `deploy/` parses, and names only what the program has."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fomoe import config
from fomoe.cli import make_app
from fomoe.cli.serve import DRAIN_S
from fomoe.engine.requests import EngineStatus
from fomoe.server.metrics import ServerMetrics

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
YAML = [path for path in FILES if path.suffix in (".yaml", ".yml")]
COMPOSE = [path for path in YAML if path.name.startswith("compose")]
TEXTS = [*FILES, ROOT / "README.md", ROOT / "Makefile"]

# Ray's own metrics that the dashboard shows, as a node of Ray 2.60 exports them.
RAY_METRICS = {
    "ray_node_cpu_utilization",
    "ray_node_disk_io_read_speed",
    "ray_node_mem_total",
    "ray_node_mem_used",
}


class IdleEngine:
    ctx_size = 1

    def generate(self, request: Any) -> Any:
        raise AssertionError("nobody asks")

    def status(self) -> EngineStatus:
        return EngineStatus(state="ready")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """The names on `/metrics`, histogram series included."""
    metrics = ServerMetrics(IdleEngine())
    metrics.responded("/v1/models", 200)
    metrics.first_token(1.0)
    metrics.next_token(1.0)
    names = set()
    for family in text_string_to_metric_families(metrics.render().decode()):
        names |= {sample.name for sample in family.samples}
    return names


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression with the place it stands in."""
    found = [
        (f"alerts {rule['alert']}", rule["expr"])
        for group in load(DEPLOY / "observability" / "alerts.yml")["groups"]
        for rule in group["rules"]
    ]
    dashboard = json.loads((DEPLOY / "observability" / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        found += [(f"panel {panel['title']}", t["expr"]) for t in panel.get("targets", [])]
    return found


@pytest.mark.parametrize("path", YAML, ids=short)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(load(path), dict)


@pytest.mark.parametrize(("place", "expression"), expressions())
def test_every_metric_of_an_expression_exists(
    place: str, expression: str, exported: set[str]
) -> None:
    names = set(re.findall(r"\b(?:ray|fomoe)_\w+", expression))
    assert names or expression.startswith("up{"), place
    own = {name.removeprefix("ray_") for name in names - RAY_METRICS}
    assert own <= exported, place
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


@pytest.mark.parametrize(("place", "expression"), expressions())
def test_labels_have_values_that_exist(place: str, expression: str, exported: set[str]) -> None:
    from fomoe.telemetry import METRICS

    table = {metric.name: metric for metric in METRICS}
    for name, labels in re.findall(r"(fomoe_\w+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            assert label == table[name].label, place
            assert value in table[name].label_values, place


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((DEPLOY / "observability" / "grafana.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for target in panel.get("targets", []):
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, panel["title"]
            assert target["datasource"]["uid"] == "${datasource}"


def test_the_parts_of_the_observability_stack_agree() -> None:
    here = DEPLOY / "observability"
    services = load(here / "compose.yaml")["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source, target, _mode = re.sub(r"\$\{[^}]*\}", "/var", volume).split(":")
            assert source.startswith("/") or (here / source).exists(), volume
            assert target.startswith("/")
    prometheus = load(here / "prometheus.yml")
    mounts = " ".join(services["prometheus"]["volumes"])
    assert [each in mounts for each in prometheus["rule_files"]] == [True]
    source = load(here / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    assert source["url"].removeprefix("http://") in " ".join(services["prometheus"]["command"])
    subprocess.run(["sh", "-n", str(here / "up.sh")], check=True)


@cache
def known_flags() -> frozenset[str]:
    """All flags of all verbs of the command line."""
    flags = {"--help"}

    def collect(command: Any) -> None:
        for parameter in command.params:
            flags.update([*parameter.opts, *parameter.secondary_opts])
        for child in getattr(command, "commands", {}).values():
            collect(child)

    collect(typer.main.get_command(make_app()))
    return frozenset(flags)


@pytest.mark.parametrize("path", TEXTS, ids=short)
def test_every_flag_of_fomoe_exists(path: Path) -> None:
    text = re.sub(r"\\\n|\n\s*#", " ", path.read_text())
    known = known_flags()
    for line in re.findall(r"\bfomoe (?:serve|run|show|logits|eval|stop)\b[^\n`|;]*", text):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line):
            assert flag in known, f"{flag} in {line!r}"
    if path in COMPOSE:
        for service in load(path)["services"].values():
            if str(service.get("image", "")).startswith("fomoe:"):
                verb, *flags = service["command"]
                assert verb == "serve"
                assert {flag.split("=")[0] for flag in flags} <= known


def test_every_flag_in_the_readme_exists() -> None:
    quoted = re.findall(r"`(--[a-z][\w-]*)", (ROOT / "README.md").read_text())
    assert set(quoted) <= known_flags()


def test_the_flag_check_sees_flags() -> None:
    assert {"--vram-budget", "--ram-budget", "--car", "--api-key-file"} <= known_flags()
    assert "--frobnicate" not in known_flags()


@pytest.mark.parametrize("path", TEXTS, ids=short)
def test_every_variable_of_fomoe_exists(path: Path) -> None:
    names = set(re.findall(r"\bFOMOE_[A-Z_]*[A-Z]\b", path.read_text()))
    config.environment(dict.fromkeys(names, "x"))


def test_the_environment_file_makes_a_configuration() -> None:
    lines = (DEPLOY / "systemd" / "fomoe.env").read_text().splitlines()
    pairs = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    values = config.environment(pairs)
    config.EngineConfig(
        model=Path(values["model"]),
        devices=config.parse_devices(values["devices"]),
        budgets=config.Budgets(
            vram_bytes=config.parse_bytes(values["vram_budget"]),
            ram_bytes=config.parse_bytes(values["ram_budget"]),
        ),
        ctx_size=int(values["ctx_size"]),
    )
    config.ServerConfig(host=values["host"], port=int(values["port"]))


def test_the_unit_follows_the_program() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd" / "fomoe.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["ExecStart"].split()[1] == "serve"
    assert int(service["TimeoutStopSec"]) > DRAIN_S
    assert service["KillMode"] == "mixed"
    assert service["EnvironmentFile"] == "/etc/fomoe/fomoe.env"
    assert service["NoNewPrivileges"] == "yes"


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
def test_the_containers_are_closed(kind: str) -> None:
    service = load(DEPLOY / "docker" / f"compose.{kind}.yaml")["services"]["fomoe"]
    assert all(str(port).startswith("127.0.0.1:") for port in service["ports"])
    assert "privileged" not in service
    assert service["cap_drop"] == ["ALL"]
    assert any(volume.endswith(":/models:ro") for volume in service["volumes"])
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_S
    assert any(flag.startswith("--api-key-file=") for flag in service["command"])
    assert (DEPLOY.parent / service["build"]["dockerfile"]).is_file()
    dockerfile = (DEPLOY.parent / service["build"]["dockerfile"]).read_text()
    assert re.search(r"^USER (?!root)\w+$", dockerfile, flags=re.MULTILINE)
    assert not re.search(r"^ARG BASE=[^:\n]+(:latest)?$", dockerfile, flags=re.MULTILINE)


def test_the_ray_cluster_fits_ray_s_schema() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = Path(spec.origin).parent / "autoscaler" / "ray-schema.json"
    cluster = load(DEPLOY / "ray" / "two-boxes.yaml")
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    for role in ("head", "worker"):
        *_, start = cluster[f"{role}_start_ray_commands"]
        assert "RAY_AUTH_MODE=token" in start
        assert "--object-store-memory=200000000" in start
        assert "--disable-usage-stats" in start
