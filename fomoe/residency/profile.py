"""Frequency profiles: how often a text's tokens want each expert, as numbers and as bytes.

The format is the original's `.freq`, little-endian: a header of four u32 (magic, version 1, layers,
entries), then entries of u16 layer, u16 expert, f32 frequency (0 to 1). Experts without an entry
were never wanted. A layer's frequencies add up to the experts per token.

Source: FOMOE, github.com/pmerolla/fomoe.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError

MAGIC, VERSION = 0x46524551, 1

_HEADER = struct.Struct("<IIII")
_ENTRY = np.dtype([("layer", "<u2"), ("expert", "<u2"), ("frequency", "<f4")])


def parse_profile(data: bytes, n_layers: int, n_experts: int) -> npt.NDArray[np.float32]:
    """Return the frequencies of a profile's bytes, float32 [L, E].

    Raises:
        ConfigError: the bytes are no profile, or one of another model.
    """
    if len(data) < _HEADER.size:
        raise ConfigError(f"a profile of {len(data)} bytes has no header of {_HEADER.size}")
    magic, version, layers, count = _HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION):
        raise ConfigError(
            f"a profile begins with {MAGIC:#x} and version {VERSION}, this file with {magic:#x} "
            f"and {version}; record one with `fomoe profile`"
        )
    expected = _HEADER.size + count * _ENTRY.itemsize
    if len(data) != expected:
        raise ConfigError(f"the profile has {len(data):,} bytes, its header says {expected:,}")
    entries = np.frombuffer(data, _ENTRY, offset=_HEADER.size)
    layer, expert, frequency = (entries[name] for name in ("layer", "expert", "frequency"))
    most = int(expert.max(initial=0))
    if layers != n_layers or most >= n_experts or int(layer.max(initial=0)) >= n_layers:
        raise ConfigError(
            f"the profile is of {layers} layers and names experts up to {most}; the model has "
            f"{n_layers} layers of {n_experts} experts: record one for it with `fomoe profile`"
        )
    if not ((frequency >= 0) & (frequency <= 1)).all():
        raise ConfigError("the profile has a frequency outside 0 to 1; it is damaged")
    if len(np.unique(layer.astype(np.int64) * n_experts + expert)) != count:
        raise ConfigError("the profile names an expert twice; it is damaged")
    frequencies = np.zeros((n_layers, n_experts), np.float32)
    frequencies[layer, expert] = frequency
    return frequencies


def pack_profile(frequencies: npt.NDArray[np.float32]) -> bytes:
    """Return the bytes of frequencies float32 [L, E]; experts of frequency 0 have no entry."""
    layer, expert = np.nonzero(frequencies)
    entries = np.zeros(len(layer), _ENTRY)
    entries["layer"], entries["expert"] = layer, expert
    entries["frequency"] = frequencies[layer, expert]
    return _HEADER.pack(MAGIC, VERSION, len(frequencies), len(entries)) + entries.tobytes()


def frequencies_of(counts: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.float32]:
    """Return the share of tokens that wanted each expert, of counts int64 [L, E]."""
    return (counts / max(tokens, 1)).astype(np.float32)
