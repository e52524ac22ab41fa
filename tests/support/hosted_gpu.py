"""Models on emulated GPUs, every expert resident."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from support.emulated_gpu import emulated_gpu

from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.gpu.host import GPUModel, planned_bytes, resident_bytes
from fomoe.model.gpu.options import HostOptions


@contextmanager
def hosted(
    path: Path, *, wave: int = 32, layers: tuple[int, ...] | None = None, **options: Any
) -> Iterator[GPUModel]:
    """Open a device with the memory that the plan asks for, and load the model."""
    file = open_gguf(path)
    spec = read_spec(file)
    given = HostOptions(
        **{"layers": layers or tuple(range(spec.n_layers)), "ctx_size": 64, "int8": False}
        | {"max_tokens": 1} | options
    )  # fmt: skip
    needed = planned_bytes(file, spec, given) + resident_bytes(file, spec, given)
    with emulated_gpu(wave, arena_bytes=needed) as gpu:
        model = GPUModel(gpu, file, spec, given)
        model.add_all_slots()
        model.load_experts()
        yield model


def decode_logits(model: GPUModel, tokens: list[int], position: int = 0, state: int = 0) -> Any:
    """Logits [T, V] of tokens one by one from a position on."""
    rows = []
    for at, token in enumerate(tokens):
        model.decode(token, position + at, state)
        rows.append(model.logits([0])[0].copy())
    return np.stack(rows)


def prefill_logits(model: GPUModel, tokens: list[int], chunk: int, position: int = 0) -> Any:
    """Logits [T, V] of tokens in chunks from a position on."""
    rows = []
    for start in range(0, len(tokens), chunk):
        part = np.array(tokens[start : start + chunk], np.int32)
        model.prefill(part, position + start)
        firsts = range(0, len(part), 16)
        rows += [model.logits(range(i, min(i + 16, len(part)))).copy() for i in firsts]
    return np.concatenate(rows)
