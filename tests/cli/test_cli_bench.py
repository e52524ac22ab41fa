"""`fomoe bench`: which ids are fed, what is printed, and that figures are what receipts say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_gguf import write_tiny
from typer.testing import Result

from fomoe.cli import bench as module
from fomoe.devices import is_gpu
from fomoe.engine.requests import Finished, GenerateRequest, Receipt, TokenEvent
from fomoe.engine.waterfall import PARTS
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec

RATES = module.Rates(memory=1e9, drive=5e8)


def receipt_of(request: GenerateRequest) -> Receipt:
    """A run of 10 ms a prompt token and 20 ms a step, a quarter of it waiting for 1 MB each."""
    steps = max(0, len(request.forced) - 1)
    parts = dict.fromkeys(PARTS, 0.0)
    return Receipt(
        prompt_tokens=len(request.prompt), prompt_ms=10.0 * len(request.prompt),
        generated_tokens=len(request.forced), generated_ms=20.0 * steps,
        hits_device=3 * steps, reads_nvme=steps, nvme_bytes=1_000_000 * steps,
        prompt_parts_ms=parts | {"dense": 1.0},
        generated_parts_ms=parts | {"dense": 15.0 * steps, "disk": 5.0 * steps},
    )  # fmt: skip


@pytest.fixture
def bench(
    llm: Any, fomoe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[Result, list[GenerateRequest]]]:
    path = write_tiny(tmp_path / "m.gguf", seed=2, quant="Q4_K_M", layers=2, vocab=300)
    asked: list[GenerateRequest] = []

    def stream(request: GenerateRequest) -> Iterator[object]:
        asked.append(request)
        for token in request.forced:
            parts = [1e-6 * i for i in range(len(PARTS))] if request.waterfall else []
            yield TokenEvent(request_id=request.request_id, token=token, parts_s=parts)
        yield Finished(request_id=request.request_id, reason="length", receipt=receipt_of(request))

    first = {"bytes": 5e5, "demand_bytes": 5e5, "demand_open_s": 1.0, "prefetch_bytes": 0.0}
    then = {"bytes": 2e6, "demand_bytes": 1.5e6, "demand_open_s": 1.004, "prefetch_bytes": 5e5}
    stats = iter([first, then])

    def prepare(self: Any) -> None:
        self.engine.stream = stream
        self.file = open_gguf(path)
        self.spec = read_spec(self.file)
        devices = tuple(llm.last.arguments["devices"])
        self.config = SimpleNamespace(threads=2, devices=devices, hosts_layers=is_gpu(devices[0]))
        self.read_stats = lambda: next(stats)

    llm.prepare = prepare
    without = module.Rates(memory=0.0, drive=RATES.drive)
    monkeypatch.setattr(
        module.Rates,
        "measured",
        classmethod(lambda cls, path, threads: RATES if threads else without),
    )

    def call(*arguments: object) -> tuple[Result, list[GenerateRequest]]:
        return fomoe("bench", path, *arguments), asked

    return call


def test_one_run_is_not_counted_and_ids_are_forced(bench: Any, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"ids": list(range(50, 150))}))
    result, asked = bench("-p", 7, "-n", 4, "-r", 3, "--ids", ids, "--json")
    assert result.exit_code == 0, result.output
    assert len(asked) == 4
    for request in asked:
        assert request.prompt == list(range(50, 57))
        assert request.forced == list(range(57, 62))  # the first comes with the prompt
        assert request.max_tokens == 5
        assert not request.stop_ids
    figures = json.loads(result.output)
    assert figures["prefill"]["tokens_per_s"] == {"median": 100.0, "min": 100.0, "max": 100.0}
    decode = figures["decode"]
    assert decode["tokens"] == 4
    assert decode["tokens_per_s"]["median"] == pytest.approx(50.0)
    assert decode["parts_ms"]["disk"] == pytest.approx(5.0)
    assert decode["hits"] == {"device": 36, "ram": 0, "nvme": 12}
    assert decode["nvme_bytes_per_token"] == pytest.approx(1e6)
    # 1 MB in 4 ms is 250 MB/s of 500
    assert figures["reads"]["demand_bytes"] == 1_000_000
    assert figures["reads"]["demand_share_of_drive"] == pytest.approx(0.5)
    wanted = decode["weight_bytes_per_token"] / 0.02 / RATES.memory
    assert decode["share_of_memory"] == pytest.approx(wanted)


def test_weights_of_a_token_are_all_but_other_experts(bench: Any, tmp_path: Path) -> None:
    result, _ = bench("-p", 1, "-n", 1, "-r", 1, "--json")
    file = open_gguf(tmp_path / "m.gguf")
    spec = read_spec(file)
    total = 0.0
    for name, info in file.tensors.items():
        if "_exps." in name:
            total += info.nbytes * spec.moe.top_k / spec.moe.n_experts
        elif name != "token_embd.weight" or "output.weight" not in file.tensors:
            total += info.nbytes
    assert json.loads(result.output)["decode"]["weight_bytes_per_token"] == pytest.approx(total)


def test_what_people_read(bench: Any) -> None:
    result, _ = bench("-p", 7, "-n", 2, "-r", 1, "--waterfall")
    assert "prefill       7 tokens      100.0 tok/s" in result.output
    assert "memory 1.0 GB/s   drive 0.50 GB/s" in result.output
    assert "device 75%" in result.output
    assert "reads    0.00 GB, of them ahead 0.00; on demand 0.25 GB/s: 50%" in result.output
    assert result.output.splitlines()[-1].split() == ["2", "0", "1", "2", "3", "4", "5", "15"]


def test_nothing_is_said_of_the_processor_beside_gpus(bench: Any) -> None:
    result, _ = bench("-p", 7, "-n", 2, "-r", 1, "--devices", "cuda:0,cuda:1")
    assert result.output.splitlines()[0].endswith("m.gguf  cuda:0, cuda:1")
    assert "of weights a token: 1.0 MB read from the drive" in result.output
    assert "memory" not in result.output


def test_a_prompt_alone(bench: Any) -> None:
    result, asked = bench("-p", 5, "-n", 0, "-r", 1, "--json")
    assert [request.max_tokens for request in asked] == [0, 0]
    assert "decode" not in json.loads(result.output)


@pytest.mark.parametrize("content", ["nonsense", "{}", "[1, 2]", '["a"]', "[1, 2, 3, 300, 5]"])
def test_ids_that_do_not_fit_are_refused(bench: Any, tmp_path: Path, content: str) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(content)
    result, _ = bench("-p", 3, "-n", 1, "--ids", ids)
    assert result.exit_code != 0
    assert str(ids) in str(result.exception)


def test_memory_is_read_at_a_plausible_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEMORY_BYTES", 1 << 22)
    assert 1e7 < module.memory_read_rate(1) < 1e13


def test_substituted_activations_are_outcomes_of_a_contract() -> None:
    receipt = Receipt(mode="car=0.35", hits_device=6, hits_ram=3, reads_nvme=1, substituted=2)
    assert module._outcomes([receipt, receipt]) == {
        "device": 12, "ram": 6, "nvme": 2, "substituted": 4,
    }  # fmt: skip
    assert module._outcomes([Receipt(hits_device=1)]) == {"device": 1, "ram": 0, "nvme": 0}


def test_a_contracts_cost_is_told_per_token() -> None:
    receipts = [
        Receipt(
            mode="kl=0.01", substituted=30, lost_mass=5.0, nvme_bytes=9_000_000,
            prompt_bytes=1_000_000, prefetch_bytes=2_000_000, shadow_bytes=500_000,
            logical_bytes=7_000_000, shadow_steps=steps, shadow_kl=0.01 * steps, price=0.02,
        )
        for steps in (1, 3)
    ]  # fmt: skip
    figures = module._contract_figures(receipts, 10)
    assert figures["bytes_per_token"] == {
        "demand": 550_000, "prefetch": 200_000, "background": 0, "shadow": 50_000,
    }  # fmt: skip
    assert (figures["substituted_per_token"], figures["shadow_steps"]) == (3.0, 4)
    assert figures["estimated_kl"] == pytest.approx(0.01)
    assert "kl=0.01: 3.0 substituted a token, KL 0.01 (4 steps)" in module._contract_line(figures)
    assert module._contract_figures([Receipt()], 10)["estimated_kl"] is None
