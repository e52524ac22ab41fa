"""Which expert lies in which slot of which tier; pure: it returns plans and moves no byte.

Shape letters: L MoE layers, E experts of a layer, T tokens, k experts per token.
"""

from fomoe.residency.budget import ExpertSizes, plan_budgets
from fomoe.residency.counters import Counters
from fomoe.residency.logical import (
    LogicalCache,
    LogicalCaches,
    LogicalCounts,
    LogicalRules,
    LogicalSnapshot,
)
from fomoe.residency.plans import Fetch, Placement, Plan
from fomoe.residency.policy import LFRU, LRU, EvictionPolicy, History
from fomoe.residency.residency import ChunkUse, Residency
from fomoe.residency.sweep import Guess, Sweep, Wave, guess_ahead
from fomoe.residency.topology import RamPolicy, Topology

__all__ = [
    "LFRU",
    "LRU",
    "ChunkUse",
    "Counters",
    "EvictionPolicy",
    "ExpertSizes",
    "Fetch",
    "Guess",
    "History",
    "LogicalCache",
    "LogicalCaches",
    "LogicalCounts",
    "LogicalRules",
    "LogicalSnapshot",
    "Placement",
    "Plan",
    "RamPolicy",
    "Residency",
    "Sweep",
    "Topology",
    "Wave",
    "guess_ahead",
    "plan_budgets",
]
