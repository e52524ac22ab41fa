"""How parts of an expert lie in files and slots, and how a read of them is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fomoe.gguf.extents import PAGE_BYTES, ExpertTable, tensor_name

SMALL_BYTES = 1 << 20  # neighbouring parts are one piece up to here: a piece has its overhead, too


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a layer's experts: where expert 0 lies in the file, and its area in a slot."""

    name: str
    shard: int
    offset: int
    nbytes: int
    area: int
    area_bytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one part to be read at once: `nbytes` at `offset` in the file, to `at` in the slot.

    `at` is where the page around `offset` goes.
    """

    part: Part
    offset: int
    nbytes: int
    at: int


Piece = tuple[Span, ...]  # read by one thread, one after the other


def parts_of(table: ExpertTable, layer: int) -> tuple[Part, ...]:
    """Return the parts of a layer's experts in the order of `table.part_names`."""
    layout = table.classes[table.size_class(layer)]
    ends = (*layout.part_area_offsets[1:], layout.slot_bytes)
    areas = zip(layout.part_area_offsets, ends, strict=True)
    return tuple(
        Part(tensor_name(layer, name), extent.shard, extent.offset, extent.nbytes, at, end - at)
        for name, extent, (at, end) in zip(
            table.part_names, table.extents(layer, 0), areas, strict=True
        )
    )


def cut(parts: Sequence[Part], expert: int, most_bytes: int) -> tuple[Piece, ...]:
    """Cut the read of an expert into pieces of at most `most_bytes`, in file order of each part.

    Args:
        parts: the layer's parts.
        expert: which of its experts.
        most_bytes: of a piece, a multiple of the page size.
    """
    pieces: list[Piece] = []
    room = 0  # in the last piece
    for part in parts:
        for span in _spans(part, expert, most_bytes):
            if span.nbytes <= room:
                pieces[-1] = (*pieces[-1], span)
                room -= span.nbytes
            else:
                pieces.append((span,))
                room = min(SMALL_BYTES, most_bytes) - span.nbytes
    return tuple(pieces)


def _spans(part: Part, expert: int, most_bytes: int) -> list[Span]:
    """Cut a part at pages into even spans."""
    offset = part.offset + expert * part.nbytes
    lead = offset % PAGE_BYTES
    n_pages = -(-(lead + part.nbytes) // PAGE_BYTES)
    count = -(-n_pages * PAGE_BYTES // most_bytes)
    each = -(-n_pages // count) * PAGE_BYTES
    spans = []
    for start in range(0, n_pages * PAGE_BYTES, each):
        first, end = max(start, lead), min(start + each, lead + part.nbytes)
        spans.append(Span(part, offset - lead + first, end - first, part.area + start))
    return spans
