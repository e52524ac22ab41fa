"""The engine on a real Ray cluster: processes, names, death, a second node."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import list_named_actors
from support.local_engine import slot_bytes
from support.tiny_gguf import write_tiny

from fomoe.engine.local import local_logits
from fomoe.errors import EngineError
from fomoe.llm import LLM

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TOKENS = np.random.default_rng(7).integers(3, 500, 48).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("ray") / "tiny.gguf", seed=3, quant="Q4_K_M")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes on this machine, as `ray start` would make them."""
    # With a port named, Ray tries it, and where it is taken leaves a socket open.
    head = {"num_cpus": 2, "include_dashboard": False, "dashboard_port": None}
    two = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 10**8})
    two.add_node(num_cpus=2, object_store_memory=10**8)
    two.wait_for_nodes()
    yield two
    if ray.is_initialized():
        ray.shutdown()
    two.shutdown()


def small_llm(model: Path, cluster: Cluster, devices: list[str], **options: object) -> LLM:
    """Budgets for about a fifth of the experts."""
    total, _ = slot_bytes(model)
    options.setdefault("ctx_size", 256)
    return LLM(model, devices=devices, vram_budget=total // 8 // len(devices) + 600_000,
               ram_budget=total // 12, address=cluster.address, **options)  # fmt: skip


def test_actors_give_the_bits_of_one_process_and_leave_nothing(
    model: Path, cluster: Cluster
) -> None:
    shm_before = {p.name for p in Path("/dev/shm").iterdir()}
    with small_llm(model, cluster, ["cpu", "cpu"], name="bits") as llm:
        assert np.array_equal(llm.logits(TOKENS), local_logits(model, TOKENS, chunk=48))
        names = {a["name"] for a in list_named_actors(all_namespaces=True)}
        assert names == {"bits-driver", "bits-storage-0", "bits-gpu-0", "bits-gpu-1"}
        pids = [h.call("pid").result(10) for h in llm.engine.running.handles.values()]
        assert len(set(pids)) == 4
        for pid in pids:  # Ray's default of 15 would lose every contended core
            assert os.getpriority(os.PRIO_PROCESS, pid) == 0
    assert list_after_close(cluster) == []
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith("fomoe")} <= shm_before


def list_after_close(cluster: Cluster) -> list[str]:
    """Names of fomoe's actors once the ends have spread through the cluster."""
    ray.init(address=cluster.address, namespace="fomoe", log_to_driver=False)
    try:
        deadline = time.monotonic() + 5
        while list_named_actors() and time.monotonic() < deadline:
            time.sleep(0.05)
        return list_named_actors()
    finally:
        ray.shutdown()


def test_a_second_node_over_tcp_gives_the_same_bits(model: Path, cluster: Cluster) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    other = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here)
    ray.shutdown()
    devices = ["cpu", f"cpu@{other}"]
    with small_llm(model, cluster, devices, name="tcp", transport="tcp") as llm:
        assert len(llm.engine.plan.topology.device_node) == 2
        assert set(llm.engine.plan.topology.device_node) == {0, 1}
        assert np.array_equal(llm.logits(TOKENS), local_logits(model, TOKENS, chunk=48))
        first = llm.generate(TOKENS, max_tokens=12, temperature=0.0, ignore_eos=True)
    with small_llm(model, cluster, ["cpu"], name="one") as llm:
        again = llm.generate(TOKENS, max_tokens=12, temperature=0.0, ignore_eos=True)
    assert first.token_ids == again.token_ids
    assert first.receipt.decision_hash == again.receipt.decision_hash


@pytest.mark.parametrize("victim", ["gpu-1", "driver"])
def test_a_killed_actor_ends_requests_with_an_error_and_starts_again(
    model: Path, cluster: Cluster, victim: str
) -> None:
    with small_llm(model, cluster, ["cpu", "cpu"], name="kill") as llm:
        before = llm.generate(TOKENS, max_tokens=8, temperature=0.0, ignore_eos=True)
        os.kill(llm.engine.running.handles[victim].call("pid").result(10), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"has died|stopped|lost"):
            llm.generate(TOKENS, max_tokens=200, temperature=0.0, ignore_eos=True)
        assert time.monotonic() - started < 2.0
        while llm.engine.status().state != "ready":
            assert time.monotonic() - started < 60.0
            time.sleep(0.05)
        after = llm.generate(TOKENS, max_tokens=8, temperature=0.0, ignore_eos=True)
        assert after.token_ids == before.token_ids
        assert llm.engine.restarts == 1


def test_car_reads_less_and_says_so(model: Path, cluster: Cluster) -> None:
    with small_llm(model, cluster, ["cpu"], name="car", quality="car=0.2") as llm:
        lossy = llm.generate(TOKENS, max_tokens=40, temperature=0.0, ignore_eos=True).receipt
        exact = llm.generate(
            TOKENS, max_tokens=40, temperature=0.0, ignore_eos=True, car=0.0
        ).receipt
    assert (lossy.mode, exact.mode) == ("car=0.2", "exact")
    assert lossy.substituted > 0
    assert exact.substituted == 0
    assert lossy.reads_nvme < exact.reads_nvme
