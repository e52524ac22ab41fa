"""Measures the routing of a written file with fomoe's own forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.engine.experts import ResidentExperts
from fomoe.engine.forward import Forward
from fomoe.engine.sequences import Sequence
from fomoe.gguf.quants import row_bytes
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.buffers import F32
from fomoe.model.layers import DenseModel
from fomoe.model.state import Batch
from fomoe.residency import LogicalRules
from fomoe.routing import Route, route_exact
from synthetic.locality import Locality, measure

CHUNK = 64


class MappedFile(GGUFFile):
    """A file whose routed experts are mapped, so that it may be larger than memory."""

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's blocks uint8 [rows, row bytes]."""
        if "_exps." not in name:
            return super().read(name)
        info = self.tensor(name)
        width = row_bytes(info.type, info.shape[-1])
        shape = info.nbytes // width, width
        return np.memmap(self.shards[info.shard], np.uint8, "r", info.offset, shape)


class RecordingExperts(ResidentExperts):
    """Keeps which experts the router chose, and what the look-ahead named for the next layer."""

    def __init__(self, file: GGUFFile, top_k: int, threads: int) -> None:
        super().__init__(file, read_spec(file), CHUNK, int8=True, threads=threads)
        self._top_k = top_k
        self.chosen: list[npt.NDArray[np.int32]] = []
        self.foreseen: list[npt.NDArray[np.int32]] = []

    def begin(self, layer: int, h: F32, route: Route, *, decoding: bool) -> None:
        """Note the route and compute it."""
        self.chosen.append(route.ids.copy())
        super().begin(layer, h, route, decoding=decoding)

    @property
    def guess_depth(self) -> int:
        """One layer, as a driver looks ahead by default."""
        return 1

    def look_ahead(self, layer: int, scores: F32, depth: int = 1) -> None:
        """Note the experts."""
        self.foreseen.append(route_exact(scores, self._top_k).ids.copy())


def trace(
    path: Path, tokens: list[int], threads: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the chosen and the foreseen experts, int32 [tokens, layers (minus 1), k].

    Tokens go through in chunks, which changes no bit of what one at a time would give.
    """
    plain = open_gguf(path)
    spec = read_spec(plain)
    file = MappedFile.__new__(MappedFile)
    file.__dict__.update(plain.__dict__)
    top_k, depth = spec.moe.top_k, spec.n_layers
    experts = RecordingExperts(file, top_k, threads)
    forward = Forward(DenseModel(file, spec, CHUNK, int8=True), experts, prefetch=True)
    sequence = Sequence(spec, len(tokens), "f16", LogicalRules(capacity=spec.moe.n_experts))
    sequence.decoding = True  # look-ahead belongs to decoding
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        forward.step(Batch.of([(sequence.state, part)]), (sequence,))
    return _join(experts.chosen, depth), _join(experts.foreseen, depth - 1)


def verify(path: Path, tokens: list[int], slots: tuple[int, ...], warmup: int) -> Locality:
    """Return the locality of the file's routing over `tokens` in decode order."""
    ids, foreseen = trace(path, tokens, threads=2)
    experts = read_spec(open_gguf(path)).moe.n_experts
    found = (ids[warmup:, 1:, :, None] == foreseen[warmup:, :, None, :]).any(axis=3)
    return replace(measure(ids, experts, slots, warmup), foresight=round(float(found.mean()), 4))


def _join(parts: list[npt.NDArray[np.int32]], depth: int) -> npt.NDArray[np.int32]:
    chunks = [np.stack(parts[i : i + depth], axis=1) for i in range(0, len(parts), depth)]
    return np.concatenate(chunks)
