"""Points on a Ray cluster against `map`."""

import os

import numpy as np
import pytest

from fomoe.actors.cluster import Cluster
from fomoe.actors.points import map_points
from fomoe.config import parse_bytes
from fomoe.errors import ConfigError, EngineError
from fomoe.sim.policies import parse_policy
from fomoe.sim.replay import replay
from fomoe.traces import Synthesis, Trace, TraceFacts, TraceWriter

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for all of these tests, and no other that may run on this machine."""
    cluster = Cluster("local")
    yield
    cluster.close()


def test_results_come_in_the_order_of_the_points():
    def slow_first(point):
        import time

        time.sleep(0.2 if point == 0 else 0)
        return point * point

    points = list(range(40))
    assert list(map_points(slow_first, points)) == [p * p for p in points]
    assert list(map_points(slow_first, [])) == []


def test_an_error_is_the_functions_own():
    results = map_points(parse_bytes, ["1GB", "2 bananas", "3GB"])
    assert next(results) == 10**9
    with pytest.raises(ConfigError, match="2 bananas"):
        next(results)


def test_a_worker_that_dies_is_told():
    def die(point):
        os._exit(1)

    with pytest.raises(EngineError, match="a worker was lost"):
        list(map_points(die, [1]))


def test_a_replay_gives_the_same_in_parallel(tmp_path):
    facts = TraceFacts(model="m", n_layers=3, n_experts=64, top_k=4, expert_bytes=(5, 5, 7))
    with TraceWriter(tmp_path / "t", facts) as writer:
        for passage, rows in Synthesis(facts=facts, texts=3, tokens=50).passages():
            writer.append(passage, rows)
    trace = Trace.open(tmp_path / "t")
    policies = [parse_policy("lfru"), parse_policy("belady")]
    here = list(replay(trace, policies, [6, 12]))
    there = list(replay(trace, policies, [6, 12], mapper=map_points))
    assert [(s.policy, s.capacity) for s in here] == [(s.policy, s.capacity) for s in there]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.costs, other.costs)
