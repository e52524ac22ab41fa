from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe import config
from fomoe.config import (
    Budgets,
    EngineConfig,
    RoutingConfig,
    ServerConfig,
    environment,
    format_bytes,
    parse_bytes,
    parse_devices,
)
from fomoe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("1048576", 1048576),
        ("512MB", 512_000_000),
        ("4GiB", 4 << 30),
        ("1.5G", 3 << 29),
        ("1.5 gb", 1_500_000_000),
        (" 7 k ", 7168),
        ("2TiB", 2 << 40),
        ("10B", 10),
        ("0.5KiB", 512),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1G", "1e9", "4XB", "4 Gi B", "nan", "1.5.2M", "4G\0"]
)
def test_a_size_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a size.*4GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 << 20, "10.0 MiB"),
        (512 << 20, "512 MiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        (218 << 30, "218 GiB"),
        (5 << 40, "5.00 TiB"),
    ],
)
def test_sizes_are_written(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(min_value=0, max_value=1 << 44))
def test_a_written_size_reads_back_within_its_digits(n_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(n_bytes)) - n_bytes) <= 0.005 * n_bytes


def full_config() -> EngineConfig:
    return EngineConfig(
        model=Path("a/model.gguf"),
        devices=("hip:0", "hip:0", "hip:1@desk"),
        attention="device",
        budgets=Budgets(vram_bytes=5, ram_bytes=0),
        routing=RoutingConfig(
            quality="bytes=0.5GB/token", car_capacity=12, sensitivities=(0.5, 2.0)
        ),
        threads=3,
        activations="f32",
        seed=(1 << 64) - 1,
    )


@pytest.mark.parametrize("config_", [EngineConfig(model=Path("m.gguf")), full_config()])
def test_the_engine_config_survives_msgpack(config_: EngineConfig) -> None:
    wire = msgpack.unpackb(msgpack.packb(config_.to_dict()))
    assert EngineConfig.from_dict(wire) == config_


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": ()}, "no device"),
        ({"devices": ("gpu",)}, "'gpu' is not a device"),
        ({"devices": ("hip",)}, "'hip' is not a device"),
        ({"devices": ("cpu:1", "cpu:1")}, "cpu:1 is named twice"),
        ({"devices": ("hip:0@desk:1", "cuda:0")}, "of 2 kinds.*one kind at a time"),
        ({"devices": ("cpu", "hip:0")}, "of 2 kinds.*one kind at a time"),
        (
            {"devices": ("hip:0", "hip:1@desk"), "attention": "driver"},
            "attention is 'driver' on hip:1@desk; the driver's process.*own machine.*use device",
        ),
        ({"attention": "device"}, "attention is 'device' on cpu"),
        ({"cpu_arm": "auto"}, "cpu_arm is 'auto' on cpu; a cpu device computes in RAM anyway"),
        (
            {"devices": ("cuda:0", "cuda:1@desk"), "cpu_arm": "auto"},
            "cpu_arm is 'auto' on cuda:0, cuda:1@desk; .*driver's node alone: use off",
        ),
        (
            {"devices": ("hip:0",), "cpu_arm": "auto", "attention": "driver"},
            "cpu_arm is 'auto' with attention 'driver'; not built for both.*attention device",
        ),
        ({"devices": ("hip:0",), "cpu_arm": "on"}, "cpu_arm is 'on'; give off, auto, or"),
        ({"devices": ("hip:0",), "cpu_arm": "0 2"}, "cpu_arm is '0 2'; give off, auto, or"),
        ({"devices": ("hip:0",), "cpu_arm": "0 -1"}, "cpu_arm is '0 -1'"),
        ({"devices": ("hip:0",), "cpu_arm": ""}, "cpu_arm is ''"),
        ({"devices": ("hip:0",), "cpu_arm": 1}, "cpu_arm is 1"),
        ({"attention": "gpu"}, "attention is 'gpu'; choose one of auto, driver, device"),
        ({"ctx_size": 0}, "ctx_size is 0.*from 1 to"),
        ({"ctx_size": True}, "ctx_size is True"),
        ({"sequences": 0}, "sequences is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"prefill_chunk": 5000}, "prefill_chunk is 5000"),
        ({"read_threads": 65}, "read_threads is 65"),
        ({"seed": -1}, "seed is -1"),
        ({"kv_dtype": "bf16"}, "kv_dtype is 'bf16'; choose one of f16, f32"),
        ({"activations": "f16"}, "activations"),
        ({"ram_policy": "none"}, "ram_policy"),
        ({"eviction": "fifo"}, "eviction"),
        ({"transport": "udp"}, "transport"),
        ({"budgets": {"vram_bytes": -1}}, "vram_bytes is -1"),
        ({"budgets": {"vram": 1}}, "unknown option vram for Budgets"),
        ({"routing": {"quality": "car=1.5"}}, "car=1.5"),
        ({"routing": {"quality": 0.5}}, "quality is 0.5"),
        ({"routing": {"shadow_every": -1}}, "shadow_every is -1"),
        ({"routing": {"sensitivities": [1.0, 0.0]}}, "sensitivity is"),
        ({"routing": {"sensitivities": [float("nan")]}}, "sensitivity is"),
        ({"routing": {"sensitivities": ["1"]}}, "sensitivity is"),
        ({"routing": {"backfill": "-1"}}, "backfill is '-1'"),
        ({"routing": {"backfill": "1e-30"}}, "backfill is '1e-30'.*no finer"),
        ({"routing": {"car_capacity": 0}}, "car_capacity is 0"),
        ({"ctx": 1}, "unknown option ctx for EngineConfig"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_dict({"model": "m.gguf", **change})


def test_devices_are_read_from_a_list() -> None:
    assert parse_devices("cpu, cpu") == ("cpu", "cpu")
    with pytest.raises(ConfigError, match="'' is not a device"):
        EngineConfig(model=Path("m"), devices=parse_devices(""))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServerConfig(host=host).api_key is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "box.example", ""])
def test_another_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, api_key="secret").host == host


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(ConfigError, match="empty"):
        ServerConfig(host="0.0.0.0", api_key="")


def test_only_known_variables_are_read() -> None:
    assert environment({"FOMOE_DEVICES": "cpu,cpu", "PATH": "/bin"}) == {"devices": "cpu,cpu"}
    with pytest.raises(ConfigError, match=r"FOMOE_DEVICE; known: FOMOE_MODEL"):
        environment({"FOMOE_DEVICE": "cpu"})


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOMOE_PORT", "9000")
    assert environment()["port"] == "9000"


def test_the_bundled_model_is_found_in_a_wheel_and_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "__file__", str(tmp_path / "fomoe" / "config.py"))
    with pytest.raises(ConfigError, match=r"fomoe serve MODEL\.gguf"):
        config.default_model()
    in_checkout = tmp_path / "models" / config.BUNDLED_MODEL
    in_wheel = tmp_path / "fomoe" / "_models" / config.BUNDLED_MODEL
    for place in (in_checkout, in_wheel):
        place.parent.mkdir(parents=True)
        place.touch()
        assert config.default_model() == place
