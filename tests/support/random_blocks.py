"""Random matrices made directly as GGML blocks: valid, zero-mean and of a chosen spread."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a block keeps its float16 scale and, for asymmetric types, its float16 minimum.

    `minimum_ratio` is the minimum over the scale that puts the mean of the block at zero.
    """

    scale: int
    minimum: int = -1
    minimum_ratio: float = 0.0


# Byte offsets of llama.cpp's block structs (ggml-common.h).
_LAYOUTS = {
    Kind.Q8_0: _Layout(0),
    Kind.Q4_0: _Layout(0),
    Kind.Q4_1: _Layout(0, 2, -7.5),
    Kind.Q5_0: _Layout(0),
    Kind.Q5_1: _Layout(0, 2, -15.5),
    Kind.Q2_K: _Layout(80, 82, 1.5),
    Kind.Q3_K: _Layout(108),
    Kind.Q4_K: _Layout(0, 2, 7.5),
    Kind.Q5_K: _Layout(0, 2, 15.5),
    Kind.Q6_K: _Layout(208),
    Kind.IQ4_NL: _Layout(0),
    Kind.IQ4_XS: _Layout(0),
}


def random_matrix(
    rng: np.random.Generator, shape: tuple[int, ...], std: float, kind: Kind
) -> npt.NDArray[np.uint8] | npt.NDArray[np.floating]:
    """Random weights of `shape` with standard deviation `std`, stored as `kind`.

    Float types give an array of `shape`; block types give uint8 [..., row bytes].
    """
    if kind not in _LAYOUTS:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
        return np.asarray(gguf.quantize(values, kind))
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % elements:
        raise ValueError(f"rows of {shape[-1]} elements cannot be {kind.name}")
    count = int(np.prod(shape)) // elements
    blocks = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    spread = rng.uniform(0.5, 1.5, count) * rng.choice([-1.0, 1.0], count)
    _set_scales(blocks, _LAYOUTS[kind], spread * 2.0**-8)
    sample = gguf.dequantize(blocks[:256].reshape(1, -1), kind)
    _set_scales(blocks, _LAYOUTS[kind], spread * 2.0**-8 * std / float(np.std(sample)))
    return blocks.reshape(*shape[:-1], shape[-1] // elements * nbytes)


def _set_scales(
    blocks: npt.NDArray[np.uint8], layout: _Layout, scale: npt.NDArray[np.float64]
) -> None:
    """Write each block's float16 scale, and minimum where the type has one."""
    blocks[:, layout.scale : layout.scale + 2] = _half_bytes(scale)
    if layout.minimum >= 0:
        minimum = _half_bytes(scale * layout.minimum_ratio)
        blocks[:, layout.minimum : layout.minimum + 2] = minimum


def _half_bytes(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """float64 [n] as the bytes of float16: uint8 [n, 2]."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)
