"""A model three times the budgets runs inside them, measured on the actors' processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.local_engine import slot_bytes
from support.tiny_gguf import write_tiny

from fomoe.actors import launch as launch_module
from fomoe.gguf.reader import open_gguf
from fomoe.llm import LLM
from fomoe.model.layers import DenseModel
from fomoe.model.state import SequenceState

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SLACK_BYTES = 64_000_000
CTX = 512


def pss(pids: list[int]) -> int:
    """Summed proportional memory: shared pages are counted once over all processes."""
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)


def test_memory_stays_within_the_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny(
        tmp_path / "big.gguf", seed=5, layers=4, experts=64, hidden=512, expert_width=512,
        quant="Q4_K", dense="Q8_0",
    )  # fmt: skip
    total, _ = slot_bytes(model)
    vram, ram = total // 9, total // 9  # two devices and the RAM tier: a third of the experts
    before: list[int] = []
    open_all = launch_module._open_all

    def measured(engine: Any, *args: Any) -> None:
        pids = [h.call("pid").result(30) for h in engine.handles.values()]
        before.append(pss(pids))
        open_all(engine, *args)

    monkeypatch.setattr(launch_module, "_open_all", measured)
    with LLM(model, devices=["cpu", "cpu"], vram_budget=vram, ram_budget=ram, ctx_size=CTX,
             address="local") as llm:  # fmt: skip
        device, in_ram = llm.engine.plan.slot_bytes()
        assert device <= 2 * vram
        assert in_ram <= ram
        assert sum(open_gguf(model).shard_bytes) >= 2.9 * (device + in_ram)
        tokens = np.random.default_rng(1).integers(3, 500, 200).tolist()
        answer = llm.generate(tokens, max_tokens=60, temperature=0.0, ignore_eos=True)
        assert answer.receipt.reads_nvme > 0
        pids = [h.call("pid").result(30) for h in llm.engine.running.handles.values()]
        grown = pss(pids) - before[0]
        dense = DenseModel(llm.file, llm.spec, 1, int8=True).nbytes
        state = SequenceState(llm.spec, CTX, "f16").nbytes
    allowed = 2 * vram + ram + dense + state + SLACK_BYTES
    assert grown <= allowed, f"{grown:,} bytes grown, {allowed:,} allowed"
