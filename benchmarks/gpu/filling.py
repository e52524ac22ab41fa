"""A whole model on one device, out of a file or out of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gpu.memory_file import MemoryFile, spec_of
from synthetic.model_file import Recipe

from fomoe.gguf.extents import ExpertTable, tensor_name
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.kernels.gpu.gpu import GPU, open_gpu
from fomoe.model.archs import read_spec
from fomoe.model.gpu import GPUModel, HostOptions, planned_bytes, resident_bytes
from fomoe.model.spec import ModelSpec

CTX = 4096
ARENA_SPARE = 64 << 20


@dataclass(frozen=True)
class Hosted:
    """A model with every expert resident; `ids` of the vocabulary are its text, in order."""

    gpu: GPU
    model: GPUModel
    spec: ModelSpec
    name: str
    ids: int
    bytes_per_token: int

    def text(self, position: int) -> int:
        """The token at a position of the benchmark's text."""
        return position % self.ids

    def prefill(self, count: int) -> None:
        """Begin anew with `count` tokens."""
        self.model.reset(0)
        tokens = np.array([self.text(i) for i in range(count)], np.int32)
        step = self.model.options.max_tokens
        for at in range(0, count, step):
            self.model.prefill(tokens[at : at + step], at)


@contextmanager
def host_recipe(device: str, recipe: Recipe, chunk: int, *, graphs: bool) -> Iterator[Hosted]:
    """Make a recipe's blocks in the device's memory."""
    file = MemoryFile(recipe)
    spec = spec_of(recipe.shape, recipe.layers)
    ids = min(recipe.drift.period, recipe.shape.vocab) - 3
    with _hosted(device, file, spec, chunk, ids, graphs=graphs) as hosted:  # type: ignore[arg-type]
        _fill(hosted, file)
        yield hosted


@contextmanager
def host_file(device: str, path: Path, chunk: int, *, graphs: bool) -> Iterator[Hosted]:
    """Load a file with all its experts."""
    file = open_gguf(path)
    spec = read_spec(file)
    with _hosted(device, file, spec, chunk, min(8189, spec.vocab), graphs=graphs) as hosted:
        hosted.model.load_experts(file)
        yield hosted


@contextmanager
def _hosted(
    device: str, file: GGUFFile, spec: ModelSpec, chunk: int, ids: int, *, graphs: bool
) -> Iterator[Hosted]:
    options = HostOptions(
        layers=tuple(range(spec.n_layers)), ctx_size=CTX, max_tokens=chunk, graphs=graphs
    )
    needed = planned_bytes(file, spec, options) + resident_bytes(file, spec, options)
    gpu = open_gpu(device, needed + ARENA_SPARE)
    try:
        model = GPUModel(gpu, file, spec, options)
        model.add_all_slots(file)
        name = f"{spec.name} ({file.path.name})"
        yield Hosted(gpu, model, spec, name, ids, token_bytes(file, spec))
    finally:
        gpu.runtime.close()


def token_bytes(file: GGUFFile, spec: ModelSpec) -> int:
    """Bytes of weights and of recurrent state that a token reads and writes; not keys and values.

    An embedding is one row of its matrix, which is not counted.
    """
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    total = file.tensors[head].nbytes
    for name, info in file.tensors.items():
        if name.startswith("blk.") and int(name.split(".")[1]) < spec.n_layers:
            share = spec.moe.top_k / spec.moe.n_experts if "_exps." in name else 1.0
            total += round(info.nbytes * share)
    state = spec.delta.n_v_heads * spec.delta.key_dim * spec.delta.value_dim * 4
    return total + 2 * state * spec.layers.count("delta")


def _fill(hosted: Hosted, file: MemoryFile) -> None:
    """Copy blocks of the pools into every slot on the device; no two experts are alike."""
    gpu, slots, spec = hosted.gpu, hosted.model.slots, hosted.spec
    table = ExpertTable.from_gguf(file, spec.n_layers)  # type: ignore[arg-type]
    used = [0] * len(slots.classes)
    for layer in range(spec.n_layers):
        size_class = slots.class_of(layer)
        offsets = slots.layout(layer).offsets
        for part, name in enumerate(table.part_names):
            pool, start = file.blocks(tensor_name(layer, name))
            nbytes = int(table.stride[layer, part])
            source = gpu.runtime.alloc(len(pool) + nbytes)  # so that no copy runs over its end
            gpu.upload(source, np.concatenate([pool, pool[:nbytes]]))
            for expert in range(spec.moe.n_experts):
                slot = used[size_class] + expert
                at = source + (start + expert * nbytes) % len(pool)
                to = slots.slot_address(size_class, slot) + offsets[part]
                gpu.runtime.copy(to, at, nbytes, gpu.stream)
                slots.set(layer, expert, slot)
            gpu.runtime.synchronize(gpu.stream)
            gpu.runtime.free(source)
        used[size_class] += spec.moe.n_experts
    slots.publish()
