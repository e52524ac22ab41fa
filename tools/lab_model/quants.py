"""A model's weights as llama.cpp's mixtures would store them: quantised and back, without imatrix.

The mixtures are llama.cpp's by tensor (Q4_K_M, Q3_K_M, Q2_K; its `llama-quant.cpp`), rounded by its
own `libggml-base`. The experts' down projections have rows of 128, and blocks hold 256 values:
here a block spans two rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from decode import LabDecoder
from torch import Tensor

_TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
_BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
_BLOCK = 256
_CHUNK = 1 << 20  # values that one thread rounds at once


@dataclass(frozen=True, slots=True)
class Mixture:
    """Types by kind of tensor; `down` and `value` have one for the layers that matter more."""

    name: str
    matrix: str
    down: tuple[str, str]
    value: tuple[str, str]
    output: str
    head: str = "Q6_K"

    def expert_bits(self, n_layers: int) -> float:
        """Mean bits per expert weight."""
        more = sum(uses_more_bits(i, n_layers) for i in range(n_layers))
        down = (more * _BITS[self.down[1]] + (n_layers - more) * _BITS[self.down[0]]) / n_layers
        return (2 * _BITS[self.matrix] + down) / 3


MIXTURES = (
    Mixture("Q4_K_M", "Q4_K", ("Q4_K", "Q6_K"), ("Q4_K", "Q6_K"), "Q4_K"),
    Mixture("Q3_K_M", "Q3_K", ("Q4_K", "Q4_K"), ("Q4_K", "Q4_K"), "Q4_K"),
    Mixture("Q2_K", "Q2_K", ("Q3_K", "Q3_K"), ("Q3_K", "Q3_K"), "Q3_K"),
)


def uses_more_bits(layer: int, n_layers: int) -> bool:
    """Whether Q4_K_M gives a layer's sensitive tensors more bits: both ends, each third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


class Rounder:
    """Rounds tensors through ggml's block formats, in threads."""

    def __init__(self, library: Path, threads: int) -> None:
        self._ggml = ctypes.CDLL(str(library))
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, weights: Tensor, kind: str) -> Tensor:
        """Return the weights as `kind` would give them back, in their own dtype and place."""
        flat = weights.detach().float().cpu().contiguous().view(-1).numpy()
        out = np.empty_like(flat)
        spans = range(0, len(flat), _CHUNK)
        list(self._pool.map(lambda a: self._round(flat, out, a, kind), spans))
        return torch.from_numpy(out).view(weights.shape).to(weights)

    def _round(self, flat: np.ndarray, out: np.ndarray, start: int, kind: str) -> None:
        part = flat[start : start + _CHUNK]
        rows = len(part) // _BLOCK
        assert rows * _BLOCK == len(part)
        number = _TYPES[kind]
        packed = np.empty(int(len(part) * _BITS[kind] / 8), np.uint8)
        size = self._ggml.ggml_quantize_chunk(
            number, _pointer(part), _pointer(packed), ctypes.c_int64(0), ctypes.c_int64(rows),
            ctypes.c_int64(_BLOCK), None,
        )  # fmt: skip
        assert size == packed.nbytes, (kind, size, packed.nbytes)
        back = self._ggml.ggml_get_type_traits(number).contents.to_float
        back(_pointer(packed), _pointer(out[start : start + _CHUNK]), ctypes.c_int64(len(part)))


class _Traits(ctypes.Structure):
    """The first fields of ggml.h's `ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        (
            "to_float",
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
        ),
    )


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def apply(decoder: LabDecoder, mixture: Mixture, round_to: Callable[[Tensor, str], Tensor]) -> None:
    """Replace a decoder's matrices by what the mixture stores; router, norms, convolutions stay."""
    n_layers = len(decoder.layers)
    decoder.embed = round_to(decoder.embed, mixture.matrix)
    decoder.head = round_to(decoder.head, mixture.head)
    for index, layer in enumerate(decoder.layers):
        more = uses_more_bits(index, n_layers)
        layer.gate_up = round_to(layer.gate_up, mixture.matrix)
        layer.down = round_to(layer.down, mixture.down[more])
        kinds = (mixture.matrix, mixture.matrix, mixture.down[more])
        layer.shared_weights = [
            round_to(w, kind) for w, kind in zip(layer.shared_weights, kinds, strict=True)
        ]
        mixer = layer.mixer
        for name, kind in (
            ("qkv", mixture.matrix), ("z", mixture.matrix), ("out", mixture.output),
            ("q", mixture.matrix), ("k", mixture.matrix), ("v", mixture.value[more]),
            ("o", mixture.output),
        ):  # fmt: skip
            if hasattr(mixer, name):
                setattr(mixer, name, round_to(getattr(mixer, name), kind))
