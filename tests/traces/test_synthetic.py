"""Synthetic traces: the same for the same seed, and like a large model's."""

import numpy as np
import pytest

from fomoe.traces import Synthesis, TraceFacts, synthetic_ids, synthetic_trace

FACTS = TraceFacts(model="397B", n_layers=2, n_experts=512, top_k=10, expert_bytes=(7, 7))


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(Synthesis(facts=FACTS, texts=3, tokens=70, domains=2))


def test_it_is_a_trace(trace):
    trace.verify()
    assert [(s.label, s.domain, len(s.rows)) for s in trace.sequences] == [
        ("text-0", "synthetic-0", 70), ("text-1", "synthetic-1", 70), ("text-2", "synthetic-0", 70)
    ]  # fmt: skip
    share = trace.probabilities[:, :, :10].astype(np.float64).sum(axis=2).mean()
    assert 0.15 < share < 0.4


def test_it_depends_on_the_seed_alone(trace):
    same = synthetic_trace(Synthesis(facts=FACTS, texts=3, tokens=70, domains=2))
    other = synthetic_trace(Synthesis(facts=FACTS, texts=3, tokens=70, domains=2, seed=1))
    assert same.records.tobytes() == trace.records.tobytes()
    assert not np.array_equal(other.ids, trace.ids)


def test_its_first_text_wants_what_synthetic_ids_say(trace):
    ids = synthetic_ids(70, 2, seed=0)
    np.testing.assert_array_equal(np.sort(trace.ids[:70, :, :10], axis=2), np.sort(ids, axis=2))


def test_sharpness_changes_probabilities_only(trace):
    sharp = synthetic_trace(Synthesis(facts=FACTS, texts=3, tokens=70, domains=2, sharpness=2))
    np.testing.assert_array_equal(sharp.ids, trace.ids)
    assert (sharp.tail < trace.tail).all()
