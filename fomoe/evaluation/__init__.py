"""Paired quality of a policy against exact mode; pure.

Shape letters: N tokens of all documents, T tokens of one run, C documents, M paired quantities,
B bootstrap draws, V vocabulary.
"""

from fomoe.evaluation.accuracy import McNemar, mcnemar
from fomoe.evaluation.divergence import TokenScores, compare, kl_divergence
from fomoe.evaluation.segments import SEGMENTS, Segment
from fomoe.evaluation.statistics import (
    ClusterSums,
    Estimate,
    Ratio,
    Worst,
    cluster_sums,
    estimate_mean,
    estimate_ratio,
    worst_mean,
    worst_ratio,
)

__all__ = [
    "SEGMENTS",
    "ClusterSums",
    "Estimate",
    "McNemar",
    "Ratio",
    "Segment",
    "TokenScores",
    "Worst",
    "cluster_sums",
    "compare",
    "estimate_mean",
    "estimate_ratio",
    "kl_divergence",
    "mcnemar",
    "worst_mean",
    "worst_ratio",
]
