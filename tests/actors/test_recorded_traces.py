"""Traces that an engine records: what its router said, whatever else the engine does."""

import numpy as np
import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of

from fomoe.engine.recorder import Recorder
from fomoe.errors import TraceError
from fomoe.sim.policies import parse_policy
from fomoe.sim.replay import replay
from fomoe.traces import Trace, TraceFacts, TraceWriter

TOKENS = 6
MASK = (1 << 64) - 1


def facts_of(engine, path):
    table, topology = engine.plan.table, engine.plan.topology
    return TraceFacts(
        model=path.stem, n_layers=topology.n_layers, n_experts=topology.n_experts, top_k=3,
        expert_bytes=tuple(table.expert_bytes(i) for i in range(topology.n_layers)),
    )  # fmt: skip


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def decision_hash(ids):
    """The hash of an exact sequence's experts, ids [T, L, k]."""
    return sum(
        splitmix64(token << 32 | layer << 16 | int(expert))
        for token, layers in enumerate(ids)
        for layer, experts in enumerate(layers)
        for expert in experts
    ) & MASK  # fmt: skip


@pytest.fixture(scope="module")
def path(model_paths):
    return model_paths["mixed"]


@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": False}, {"prefill_chunk": 7}, {"devices": ("cpu", "cpu")}],
    ids=["overlapped", "serial", "chunks", "two devices"],
)
def test_every_token_is_recorded(path, prompt, tmp_path, local_models, options):
    total, _ = slot_bytes(path)
    file = tmp_path / "t"
    with local_engine(path, vram=total // 5, ram=total // 5, trace=file, **options) as engine:
        facts = facts_of(engine, path)
        request = greedy(prompt, TOKENS, request_id="one", domain="prose")
        first = list(engine.client.stream(request))
        list(engine.client.stream(greedy(prompt[:5], 2, request_id="two")))
    trace = Trace.open(file)
    trace.verify()
    assert trace.facts == facts
    one, two = trace.sequences
    assert (one.label, one.domain, two.label, two.domain) == ("one", "prose", "two", "")
    fed = prompt + tokens_of(first)[:-1]  # the last token goes through no layer
    assert trace.records["token"][one.rows].tolist() == fed
    assert trace.records["position"][one.rows].tolist() == list(range(len(fed)))
    assert trace.is_prompt[one.rows].tolist() == [True] * len(prompt) + [False] * (TOKENS - 1)
    assert len(two.rows) == 5 + 1
    last = int(trace.records["hash"][one.rows[-1]])
    assert last == int(finished(first).receipt.decision_hash, 16)
    assert last == decision_hash(trace.ids[one.rows, :, :3])
    # The same rows as of a model that has every expert at hand.
    local, again = local_models["mixed"], tmp_path / "again"
    with TraceWriter(again, facts) as writer:
        local.forward.recorder = Recorder(writer, local.chunk)
        local.run(greedy(prompt, TOKENS, request_id="one", domain="prose"))
        local.forward.recorder = None
    same = Trace.open(again)
    for field in ("ids", "probabilities", "tail"):
        np.testing.assert_array_equal(same.records[field], trace.records[field][one.rows])


def test_what_a_lossy_answer_wanted_is_recorded(path, prompt, tmp_path):
    total, _ = slot_bytes(path)
    file = tmp_path / "t"
    with local_engine(path, vram=total // 5, ram=0, trace=file) as engine:
        events = list(engine.client.stream(greedy(prompt, TOKENS, quality="car=0.6")))
    receipt = finished(events).receipt
    assert receipt.substituted > 0
    trace = Trace.open(file)
    trace.verify()
    assert trace.records["hash"][-1] == int(receipt.decision_hash, 16)
    assert int(trace.records["hash"][-1]) != decision_hash(trace.ids[:, :, :3])


@pytest.mark.parametrize("quality", ["price=0.05", "car=0.6", "bytes=20KB/token"])
def test_a_replay_repeats_what_the_engine_decided(path, prompt, tmp_path, quality):
    """Probabilities are rounded in a trace, which on these rows tips no decision."""
    total, _ = slot_bytes(path)
    file = tmp_path / "t"
    with local_engine(path, vram=total // 5, ram=0, trace=file) as engine:
        receipt = finished(list(engine.client.stream(greedy(prompt, 40, quality=quality)))).receipt
    trace = Trace.open(file)
    policy = parse_policy(f"{quality}+lfru")
    (score,) = replay(trace, [policy], [receipt.logical_capacity])
    assert score.sums("tokens").max() == 39
    assert receipt.substituted > 5
    assert score.sums("substituted").sum() == receipt.substituted
    lost = score.sums("lost_mass").sum()
    assert lost == pytest.approx(receipt.lost_mass, rel=0.01)


def test_a_file_that_cannot_be_written_is_told_at_start(path, tmp_path):
    with pytest.raises(TraceError, match="cannot be written"):  # noqa: SIM117
        with local_engine(path, trace=tmp_path / "none" / "t"):
            pass


def test_a_full_disk_ends_the_request_and_not_the_engine(path, prompt, tmp_path, monkeypatch):
    with local_engine(path, trace=tmp_path / "t") as engine:

        def full(self, passage, rows):
            raise TraceError(self.path, "cannot be written (No space left on device)", "make room")

        with monkeypatch.context() as patch:
            patch.setattr(TraceWriter, "append", full)
            end = finished(list(engine.client.stream(greedy(prompt, 2))))
        assert (end.reason, "No space left" in end.error) == ("error", True)
        assert finished(list(engine.client.stream(greedy(prompt, 2)))).error is None
