"""Collects router rows of the passes of a request and writes them to a trace after each pass."""

from __future__ import annotations

from fomoe.model.buffers import F32
from fomoe.traces import Passage, RouterRows, RowCutter, TraceWriter


class Recorder:
    """Holds the router rows of one pass; the layer loop fills them, `write` empties them.

    A row is cut to its best candidates when its layer has been sent to the devices, so that this
    happens while they work; the loop allocates and writes nothing.
    """

    def __init__(self, writer: TraceWriter, max_tokens: int) -> None:
        facts = writer.facts
        rows = RouterRows.empty(facts.n_layers, max_tokens, facts.candidates)
        self._writer = writer
        self._cutter = RowCutter(facts.n_experts, rows)

    def take(self, layer: int, scores: F32) -> None:
        """Keep the scores [T, E] of the pass in `layer`."""
        self._cutter.cut(layer, scores)

    def new_sequence(self) -> int:
        """Return the number of a text that begins."""
        return self._writer.new_sequence()

    def write(self, passage: Passage, first: int = 0) -> None:
        """Write the tokens of a passage, which are those from row `first` on of the last pass.

        Raises:
            TraceError: the file cannot be written to.
        """
        self._writer.append(passage, self._cutter.rows.part(first, first + len(passage.tokens)))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
