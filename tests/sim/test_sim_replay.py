"""Replay against caches and rules written out by hand, and what its figures must not depend on."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe.engine.decisions import Decider
from fomoe.errors import ConfigError
from fomoe.residency.logical import LogicalCaches
from fomoe.routing.price import BudgetPrice
from fomoe.sim.belady import belady_misses
from fomoe.sim.group import COSTS
from fomoe.sim.losses import LOSSES, reference_losses
from fomoe.sim.policies import parse_policy
from fomoe.sim.replay import GROUP_TEXTS, Point, grouped, replay, run_point
from fomoe.traces import Passage, Synthesis, Trace, TraceFacts, TraceWriter, cut_rows

FACTS = TraceFacts(model="m", n_layers=2, n_experts=70, top_k=3, expert_bytes=(5, 7))
LOSSY = ("car=0.6+lru", "price=0.03+lfru", "drop=0.3+mass+protected=0", "car=0.2+background=1/2")


def write_trace(path, texts, seed=0):
    """Texts as lists of is_prompt, one per token."""
    rng = np.random.default_rng(seed)
    with TraceWriter(path, FACTS) as writer:
        for i, text in enumerate(texts):
            number = writer.new_sequence()
            drift = rng.normal(size=(2, 1, 70))
            for position, is_prompt in enumerate(text):
                scores = 2 * drift + rng.normal(size=(2, 1, 70))
                passage = Passage(
                    sequence=number, tokens=[1], position=position, label=f"{i}",
                    domain=f"d{i % 2}", is_prompt=is_prompt,
                )  # fmt: skip
                writer.append(passage, cut_rows(scores))
    return Trace.open(path)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "t"
    texts = [[True] * 5 + [False] * 60, [False] * 40, [True] * 50, [True, False] * 40, [False]]
    return write_trace(path, texts)


def costs(trace, policy, capacity=9, warmup=0, texts=None):
    rows = [text.rows for text in trace.sequences]
    chosen = rows if texts is None else [rows[i] for i in texts]
    return run_point(Point(trace.path, tuple(chosen), policy, capacity, warmup))


def column(values, name):
    return values[..., COSTS.index(name)]


def test_lru_by_hand(trace):
    want = np.zeros((len(trace.sequences), 2), int)
    for i, text in enumerate(trace.sequences):
        for layer in range(2):
            stack = []
            for row in text.rows:
                event = trace.ids[row, layer, :3].tolist()
                if not trace.is_prompt[row]:
                    want[i, layer] += len(set(event) - set(stack[:9]))
                stack = sorted(event, reverse=True) + [e for e in stack if e not in event]
    got = costs(trace, "lru")
    np.testing.assert_array_equal(column(got, "demand"), want)
    tokens = [int((~trace.is_prompt[text.rows]).sum()) for text in trace.sequences]
    np.testing.assert_array_equal(column(got, "tokens"), np.repeat(tokens, 2).reshape(-1, 2))
    np.testing.assert_array_equal(column(got, "wanted"), 3 * column(got, "tokens"))
    for name in ("background", "substituted", "dropped", *LOSSES):
        assert not column(got, name).any()


def one_by_one(trace, policy_text, capacity, text):
    """A text's costs from single decisions; prompt tokens go through an exact decider."""
    policy = parse_policy(policy_text)
    caches = LogicalCaches(1, 2, 70, policy.logical_rules(capacity))
    lossy = Decider(policy.rule, caches, 3)
    exact = Decider(parse_policy("exact").rule, caches, 3)
    sums = np.zeros((2, len(COSTS)))
    for row in trace.sequences[text].rows:
        for layer in range(2):
            ids = np.ascontiguousarray(trace.ids[row, layer][None], np.int32)
            p = np.ascontiguousarray(trace.probabilities[row, layer][None], np.float32)
            decider = exact if trace.is_prompt[row] else lossy
            d = decider.decide_compact(layer, ids, p)
            if trace.is_prompt[row]:
                continue
            counts = [1, 3, d.read.sum(), (d.background >= 0).sum(), d.substituted.sum()]
            counts += [(d.ids < 0).sum(), *reference_losses(ids, p, d.ids, d.weights)[0]]
            sums[layer] += counts
    return sums


@pytest.mark.parametrize("policy", LOSSY)
def test_lossy_rules_are_the_engines_decisions(trace, policy):
    got = costs(trace, policy)
    for text in range(len(trace.sequences)):
        # Sums of up to 80 float64 terms.
        np.testing.assert_allclose(got[text], one_by_one(trace, policy, 9, text), atol=1e-9)
    assert column(got, "substituted").any() != column(got, "dropped").any()
    assert (column(got, "background") > 0).any() == ("background" in policy)


@pytest.mark.parametrize("policy", ["lfru", "mass", "belady", *LOSSY])
def test_neighbours_and_their_order_do_not_matter(trace, policy):
    whole = costs(trace, policy)
    for i in range(len(trace.sequences)):
        np.testing.assert_allclose(costs(trace, policy, texts=[i])[0], whole[i], atol=1e-9)
    some = costs(trace, policy, texts=[4, 0, 3])
    np.testing.assert_allclose(some, whole[[4, 0, 3]], atol=1e-9)


@pytest.mark.parametrize("policy", ["lru", "mass", "price=0.03+lfru"])
def test_a_warm_up_is_run_and_not_scored(trace, policy):
    whole, behind = costs(trace, policy), costs(trace, policy, warmup=30)
    starts = tuple(text.rows[:30] for text in trace.sequences)
    first = run_point(Point(trace.path, starts, policy, 9))
    np.testing.assert_allclose(first + behind, whole, atol=1e-9)
    assert column(behind, "tokens")[:, 0].tolist() == [35, 10, 0, 25, 0]


def test_a_budget_steers_each_text_for_itself(trace):
    """Against the controller told of each decode token's bytes, and the rule at its price."""
    got = costs(trace, "bytes=3+lfru+protected=0")
    for i, text in enumerate(trace.sequences):
        policy, price = parse_policy("price=0+lfru+protected=0"), BudgetPrice(3)
        caches = LogicalCaches(1, 2, 70, policy.logical_rules(9))
        decider, demand, substituted = Decider(policy.rule, caches, 3), 0, 0
        for row in text.rows:
            is_prompt, spent = bool(trace.is_prompt[row]), 0
            for layer, size in enumerate(FACTS.expert_bytes):
                ids = np.ascontiguousarray(trace.ids[row, layer][None], np.int32)
                p = np.ascontiguousarray(trace.probabilities[row, layer][None], np.float32)
                now = np.array([0.0 if is_prompt else price.price], np.float32)
                d = decider.decide_compact(layer, ids, p, None, now)
                spent += size * int(d.read.sum())
                demand += 0 if is_prompt else int(d.read.sum())
                substituted += int(d.substituted.sum())
            if not is_prompt:
                price = price.after(spent)
        assert column(got[i], "demand").sum() == demand
        assert column(got[i], "substituted").sum() == substituted
    assert column(got, "substituted").sum() > 20
    np.testing.assert_array_equal(
        costs(trace, "bytes=3+lfru+protected=0", texts=[3, 1]), got[[3, 1]]
    )


@pytest.mark.parametrize("policy", ["lru", "lfru", "mass", "lfru+decay=0.5"])
@pytest.mark.parametrize("capacity", [3, 9, 70])
def test_no_exact_policy_reads_less_than_the_optimum(trace, policy, capacity):
    own, best = costs(trace, policy, capacity), costs(trace, "belady", capacity)
    assert (column(own, "demand") >= column(best, "demand")).all()


def test_the_optimum_is_that_of_its_own_module(trace):
    text = trace.sequences[0]
    ids = trace.ids[text.rows, :, :3].astype(np.int32)
    missed = belady_misses(ids, ~trace.is_prompt[text.rows], 9, 70)
    np.testing.assert_array_equal(
        column(costs(trace, "belady"), "demand")[0], missed.sum(axis=(0, 2))
    )


@given(policy=st.sampled_from(LOSSY), capacity=st.integers(6, 70))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_every_pick_is_accounted_for(trace, policy, capacity):
    got = costs(trace, policy, capacity)
    for name in COSTS:
        assert (column(got, name) >= -1e-6).all(), name  # float16 sums differ in the last place
    gone = column(got, "substituted") + column(got, "dropped")
    assert (column(got, "demand") + gone <= column(got, "wanted")).all()
    assert (column(got, "lost_mass") <= column(got, "left_out") + 1e-9).all()
    assert (column(got, "lost_squares") <= column(got, "left_out") + 1e-9).all()


def test_replay_scores_every_policy_at_every_capacity(trace):
    policies = [parse_policy("lru"), parse_policy("price=0.03+lfru")]
    scores = list(replay(trace, policies, [9, 20], warmup=2))
    assert [(s.policy.text, s.capacity) for s in scores] == [
        ("lru", 9), ("price=0.03+lfru", 9), ("lru", 20), ("price=0.03+lfru", 20)
    ]  # fmt: skip
    for score in scores:
        want = costs(trace, score.policy.text, score.capacity, warmup=2)
        np.testing.assert_allclose(score.costs, want, atol=1e-9)
        np.testing.assert_array_equal(score.sums("demand"), column(score.costs, "demand"))


def test_many_texts_go_in_groups_of_like_size():
    texts = [np.arange(1)] * (2 * GROUP_TEXTS + 1)
    assert [len(group) for group in grouped(texts)] == [11, 11, 11]
    assert list(grouped([])) == [()]


def test_what_makes_no_sense_is_refused(trace, tmp_path):
    for capacity in (2, 71):
        with pytest.raises(ConfigError, match=f"capacity {capacity}: m takes 3 of 70"):
            list(replay(trace, [parse_policy("lru")], [capacity]))
    with pytest.raises(ConfigError, match="lower --warmup"):
        list(replay(trace, [parse_policy("lru")], [9], warmup=80))
    prompts = write_trace(tmp_path / "prompts", [[True] * 5])
    with pytest.raises(ConfigError, match="5 tokens, none of them of decode"):
        list(replay(prompts, [parse_policy("lru")], [9]))


@pytest.mark.parametrize(("slots", "hits"), [(50, 0.60), (86, 0.72), (128, 0.81)])
def test_synthetic_texts_hit_as_measured_ones(tmp_path, slots, hits):
    facts = TraceFacts(model="397B", n_layers=2, n_experts=512, top_k=10, expert_bytes=(7, 7))
    with TraceWriter(tmp_path / "t", facts) as writer:
        for passage, rows in Synthesis(facts=facts, tokens=500).passages():
            writer.append(passage, rows)
    (score,) = replay(Trace.open(tmp_path / "t"), [parse_policy("lru")], [slots], warmup=200)
    assert 1 - score.sums("demand").sum() / score.sums("wanted").sum() == pytest.approx(
        hits, abs=0.03
    )
