"""Specs of policies: what they mean, and what is refused."""

from fractions import Fraction

import pytest

from fomoe.errors import ConfigError
from fomoe.routing.rules import CacheAwareRouting, DropRouting, ExactRouting, PriceRouting
from fomoe.sim.policies import parse_policy


@pytest.mark.parametrize(
    ("text", "rule", "caches"),
    [
        ("lfru", ExactRouting(), {"eviction": "lfru"}),
        ("exact", ExactRouting(), {"eviction": "lru"}),
        ("belady", None, {"eviction": "lru"}),
        ("mass+shift=4", ExactRouting(), {"eviction": "mass", "shift": 4}),
        ("car=0.35", CacheAwareRouting(0.35), {"eviction": "lru"}),
        ("lru+car=0.6+renormalise+budget=2", CacheAwareRouting(0.6, 2, True), {"eviction": "lru"}),
        ("price=0.05+lfru", PriceRouting(0.05), {"eviction": "lfru"}),
        ("price=0.08+protected=1+kappa=0.5", PriceRouting(0.08, 1, 0.5), {"eviction": "lru"}),
        ("bytes=1MB/token+lfru+protected=3", PriceRouting(0.0, 3), {"eviction": "lfru"}),
        ("drop=0.1+kappa=1", DropRouting(0.1, kappa=1.0), {"eviction": "lru"}),
        (
            "car=0.35+background=28/60+delay=3+decay=0.9",
            CacheAwareRouting(0.35),
            {"eviction": "lru", "backfill": Fraction(28, 60), "delay": 3, "decay": Fraction(9, 10)},
        ),
    ],
)
def test_specs(text, rule, caches):
    policy = parse_policy(text)
    assert (policy.text, policy.rule, dict(policy.caches)) == (text, rule, caches)
    assert policy.budget_bytes == (10**6 if "bytes" in text else 0)
    assert policy.is_exact == (rule is None or rule == ExactRouting())
    rules = policy.logical_rules(20)
    assert rules.capacity == 20
    assert all(getattr(rules, name) == value for name, value in caches.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown"),
        ("lfu", "'lfu' in policy 'lfu' is unknown; write a rule"),
        ("car", "'car' has no number"),
        ("car=", "has no number"),
        ("price=much", "'price=much' has no number"),
        ("bytes=much", "has no number"),
        ("bytes=0", "at least one byte"),
        ("bytes=1MB+price=0.1", "has 2 rules"),
        ("background=1/0", "has no number"),
        ("lru+lfru", "gives eviction twice"),
        ("car=0.3+price=0.1", "has 2 rules"),
        ("car=0.3+car=0.4", "gives car twice"),
        ("exact+belady", "has 2 rules"),
        ("lru+kappa=1", "exact does not take kappa"),
        ("belady+background=1", "belady does not take background=1"),
        ("belady+lfru", "belady does not take lfru"),
        ("car=0.3+protected=2", "car does not take protected"),
        ("price=0.1+budget=2", "price does not take budget"),
        ("price=-1", "price -1.0 of a read"),
        ("price=0.1+kappa=2", "kappa 2.0"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_policy(text)
