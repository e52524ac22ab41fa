"""A layer in two halves on two emulated devices: the bits of the one that has all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.emulated_gpu import emulated_gpu
from support.hosted_gpu import decode_logits, hosted

from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.gpu.host import GPUModel, planned_bytes, resident_bytes
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.places import Places

VECTORS = Path(__file__).parents[1] / "vectors"
CHUNK, PROMPT, COUNT = 16, 7, 3
SMALL = 256 << 10  # of a plan, for what is not counted one by one


class Halves:
    """Both halves of a model and the memory between them, which one of them has pinned."""

    def __init__(self, dense: GPUModel, experts: GPUModel) -> None:
        self.dense, self.experts = dense, experts
        hidden, rows = dense.spec.hidden, [CHUNK]
        shapes = (
            (np.float32, (*rows, hidden)), (np.int8, (*rows, hidden)),
            (np.float32, (*rows, hidden // 32, 2)), (np.float32, (*rows, dense.spec.moe.n_experts)),
            (np.float32, (*rows, hidden)),
        )  # fmt: skip
        pinned = [dense.runtime.pinned(int(np.prod(s)) * np.dtype(t).itemsize) for t, s in shapes]
        arrays = [
            p.array[: int(np.prod(shape)) * np.dtype(kind).itemsize].view(kind).reshape(shape)
            for p, (kind, shape) in zip(pinned, shapes, strict=True)
        ]
        self.places = Places(*arrays, pinned[0].device_address - pinned[0].address)
        for half in (dense, experts):
            half.lend(self.places)

    def run(self, tokens: list[int], position: int, *, chosen: bool) -> np.ndarray:
        """The last token's logits; `chosen` by the experts' device, or told by the host."""
        dense, experts, given = self.dense, self.experts, np.array(tokens, np.int32)
        for half in (dense, experts):
            half.begin(given, position, 0)
        dense.embed()
        for layer in range(dense.spec.n_layers):
            dense.front(layer)
            assert dense.scores(layer).shape == (len(tokens), dense.spec.moe.n_experts)
            if chosen:
                experts.own_back(layer)
            else:
                experts.gather(layer)
                self.run_waves(layer)
                experts.combine(layer)
            experts.take_hidden(self.places.sums.ctypes.data)
            dense.close_layer(layer)
        return dense.logits([len(tokens) - 1]).copy()

    def run_waves(self, layer: int) -> None:
        count, slots = self.dense.spec.moe.n_experts, self.experts.slots
        alike = [i for i in range(layer) if slots.class_of(i) == slots.class_of(layer)]
        for first in range(0, count, 3):
            ids = np.arange(first, min(count, first + 3), dtype=np.int32)
            self.experts.wave(layer, ids, ids + np.int32(count * len(alike)))  # as loaded
            self.experts.runtime.synchronize(self.experts.stream)


@contextmanager
def halves(path: Path, options: HostOptions) -> Iterator[Halves]:
    file = open_gguf(path)
    spec = read_spec(file)
    dense = replace(options, part="dense", ahead=True)
    experts = replace(options, part="experts", embedding=False, head=False)
    planned = [planned_bytes(file, spec, half) for half in (dense, experts)]
    slots = resident_bytes(file, spec, experts)
    with (
        emulated_gpu(32, seed=2, arena_bytes=planned[0]) as first,
        emulated_gpu(32, seed=3, arena_bytes=planned[1] + slots) as second,
    ):
        models = GPUModel(first, file, spec, dense), GPUModel(second, file, spec, experts)
        for model, most in zip(models, planned, strict=True):
            assert most - SMALL < model.gpu.arena.used <= most
        models[1].add_all_slots()
        models[1].load_experts()
        yield Halves(*models)


@pytest.mark.parametrize("int8", [True, False])
def test_two_halves_have_the_bits_of_the_whole(int8: bool) -> None:
    path = VECTORS / "wide_q4_k_m.gguf"
    tokens = np.load(path.with_suffix(".npz"))["tokens"][: PROMPT + COUNT].tolist()
    prompt, text = tokens[:PROMPT], tokens[PROMPT:]
    with hosted(path, int8=int8, max_tokens=CHUNK) as model:
        model.prefill(np.array(prompt, np.int32), 0)
        want = model.logits([PROMPT - 1]).copy(), decode_logits(model, text, PROMPT)
        layers = tuple(range(model.spec.n_layers))
    options = HostOptions(
        layers=layers, ctx_size=64, int8=int8, kv_dtype="f32", max_tokens=CHUNK
    )  # fmt: skip
    with halves(path, options) as both:
        for chosen in (True, False):
            both.dense.reset(0)
            np.testing.assert_array_equal(both.run(prompt, 0, chosen=chosen), want[0])
        for at, token in enumerate(text):
            got = both.run([token], PROMPT + at, chosen=True)
            np.testing.assert_array_equal(got[0], want[1][at])
