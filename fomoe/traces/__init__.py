"""What the router said for every token and layer, in a file: recorded, read, synthesised.

Shape letters: T tokens, L MoE layers, E experts of a layer, C candidates that a row keeps,
k experts per token.
"""

from fomoe.traces.format import MOST_CANDIDATES, TraceFacts
from fomoe.traces.reader import SequenceRows, Trace
from fomoe.traces.records import Passage
from fomoe.traces.rows import RouterRows, RowCutter, cut_rows
from fomoe.traces.synthetic import Synthesis, SyntheticRouter, synthetic_ids, synthetic_trace
from fomoe.traces.writer import TraceWriter

__all__ = [
    "MOST_CANDIDATES",
    "Passage",
    "RouterRows",
    "RowCutter",
    "SequenceRows",
    "Synthesis",
    "SyntheticRouter",
    "Trace",
    "TraceFacts",
    "TraceWriter",
    "cut_rows",
    "synthetic_ids",
    "synthetic_trace",
]
