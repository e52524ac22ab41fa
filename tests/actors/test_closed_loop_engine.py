"""The closed loop on the whole engine: tiers, reads and actors, with policies that act."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.local_engine import local_engine, slot_bytes

from fomoe.cli.forcing import ModelRunner
from fomoe.config import RoutingConfig
from fomoe.engine.local import sequence_logits
from fomoe.evaluation.closed_loop import EXACT, closed_loop
from fomoe.evaluation.divergence import negative_log_likelihoods
from fomoe.evaluation.summary import summarise
from fomoe.evaluation.texts import Window
from fomoe.llm import LLM

SCORED = 20


def runner_of(engine, spec):
    """Return a runner over an engine without Ray: `LLM.force` needs nothing else of an LLM."""

    def force(*arguments, **fields):
        return LLM.force(SimpleNamespace(engine=engine.client), *arguments, **fields)

    return ModelRunner(SimpleNamespace(force=force, spec=spec))


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(5)
    return [
        Window(f"d{i}", "", *(rng.integers(0, 300, n).tolist() for n in (12, SCORED + 1)))
        for i in range(3)
    ]


def test_policies_are_paired_with_exact_mode_on_the_engine(model_paths, local_models, windows):
    path, model = model_paths["mixed"], local_models["mixed"]
    total, _ = slot_bytes(path)
    routing = RoutingConfig(car_capacity=6, shadow_every=0)
    with local_engine(
        path, vram=int(total * 0.15), ram=int(total * 0.1), routing=routing
    ) as engine:
        runner = runner_of(engine, model.spec)
        results = closed_loop(
            runner, windows, ["car=0.35", "price=0.01"], null=True, on_run=lambda: None
        )
    for window, run in zip(windows, results.runs[EXACT], strict=True):
        whole = sequence_logits(
            model.forward, model.sequence(), window.prefix + window.forced, model.chunk
        )
        rows = whole[len(window.prefix) : -1]
        want = negative_log_likelihoods(rows, np.array(window.forced[1:]))
        np.testing.assert_array_equal(run.scores.exact_nll, want)
        assert run.cost.steps == SCORED
        assert run.cost.demand_bytes > 0
    car, price = (summarise(results, spec) for spec in ("car=0.35", "price=0.01"))
    assert car.cost.substituted > price.cost.substituted > 0
    assert 0 < car.cost.logical_bytes < price.cost.logical_bytes
    assert car.kl.mean > car.null_kl.mean > 0
    assert car.kl_over_null.mean > 0


def test_a_policy_that_swaps_nothing_is_exact_to_the_bit(model_paths, local_models, windows):
    path, model = model_paths["mixed"], local_models["mixed"]
    total, _ = slot_bytes(path)
    routing = RoutingConfig(car_capacity=model.spec.moe.n_experts, shadow_every=0)
    warm = [Window(w.document, "", list(range(300)), w.forced) for w in windows]
    with local_engine(path, vram=int(total * 0.3), ram=0, routing=routing, ctx_size=400) as engine:
        results = closed_loop(
            runner_of(engine, model.spec), warm, ["price=0.000001"], null=False,
            on_run=lambda: None,
        )  # fmt: skip
    for run in results.runs["price=0.000001"]:
        assert run.cost.substituted == 0
        assert not run.scores.kl.any()
        assert not run.scores.excess.any()
