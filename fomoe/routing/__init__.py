"""Router scores to experts and weights; pure.

Shape letters: T tokens, E experts of a layer, k experts per token, P = T * k pairs.
"""

from fomoe.routing.groups import ExpertGroups, group_by_expert
from fomoe.routing.prediction import Prediction, expect_of_chunk, predict_experts
from fomoe.routing.router import Route, route_exact
from fomoe.routing.rules import (
    CacheAwareRouting,
    DropRouting,
    ExactRouting,
    PriceRouting,
    RouteCounts,
    RoutingRule,
    count_outcomes,
)

__all__ = [
    "CacheAwareRouting",
    "DropRouting",
    "ExactRouting",
    "ExpertGroups",
    "Prediction",
    "PriceRouting",
    "Route",
    "RouteCounts",
    "RoutingRule",
    "count_outcomes",
    "expect_of_chunk",
    "group_by_expert",
    "predict_experts",
    "route_exact",
]
