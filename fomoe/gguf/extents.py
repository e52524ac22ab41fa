"""Where each expert's bytes lie in the files, and how they lie in a slot of memory.

A GGUF keeps the experts of a layer back to back in one tensor per part: `ffn_gate_exps`,
`ffn_up_exps` and `ffn_down_exps`, or `ffn_gate_up_exps` (gate rows first) and `ffn_down_exps`.
Direct reads move whole 4096-byte pages, so a slot holds for each part an area of whole pages that
fits the page-aligned superset of the part, whose first byte then lies at `offset % 4096` in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import GGUFError
from fomoe.gguf.quants import GGMLType
from fomoe.gguf.reader import GGUFFile, TensorInfo

PAGE_BYTES = 4096
SEPARATE_PARTS = ("gate", "up", "down")
FUSED_PARTS = ("gate_up", "down")
MAX_EXPERTS = 4096
MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class Extent:
    """One part of one expert: `nbytes` at byte `offset` of file `shard`."""

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Layers whose experts share one slot layout; all sizes are multiples of 4096 bytes.

    Attributes:
        slot_bytes: size of a slot.
        part_area_offsets: where each part's area begins in the slot.
        layers: the layers of this class, ascending.
    """

    slot_bytes: int
    part_area_offsets: tuple[int, ...]
    layers: tuple[int, ...]


def tensor_name(layer: int, part: str) -> str:
    """The name of the tensor that holds `part` of all experts of `layer`."""
    return f"blk.{layer}.ffn_{part}_exps.weight"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertTable:
    """The extents and slot layouts of all routed experts; rows of layers without experts are -1.

    L layers, P parts (`part_names`), E experts per layer.

    Attributes:
        n_layers: L, with the layers that have no experts.
        n_experts: E, 0 for a dense model.
        part_names: ("gate", "up", "down") or ("gate_up", "down").
        shard_bytes: the size that each file of the model must have.
        shard: file number, int32 [L, P].
        offset: byte offset of expert 0, int64 [L, P].
        stride: bytes of one expert, int64 [L, P].
        qtypes: GGMLType of gate, up and down, int32 [L, 3].
        layer_class: index into `classes`, int32 [L].
        classes: the slot layouts.
    """

    n_layers: int
    n_experts: int
    part_names: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    stride: npt.NDArray[np.int64]
    qtypes: npt.NDArray[np.int32]
    layer_class: npt.NDArray[np.int32]
    classes: tuple[SizeClass, ...]

    @classmethod
    def from_gguf(cls, file: GGUFFile, n_layers: int | None = None) -> ExpertTable:
        """Build the table from the tensors of `file`.

        Args:
            file: the opened model.
            n_layers: layers 0..n_layers-1 are looked at; all that have expert tensors when None.

        Raises:
            GGUFError: parts are missing, differ in shape, or layers mix fused and separate parts.
        """
        layers = _expert_layers(file, n_layers)
        if n_layers is None:
            n_layers = max(layers, default=-1) + 1
        fused = any(tensor_name(layer, "gate_up") in file.tensors for layer in layers)
        names = FUSED_PARTS if fused else SEPARATE_PARTS
        arrays = _empty_arrays(n_layers, len(names))
        n_experts = 0
        for layer in layers:
            parts = [file.tensor(tensor_name(layer, part)) for part in names]
            _check_shapes(file, parts, n_experts)
            n_experts = parts[0].shape[0]
            arrays["shard"][layer] = [part.shard for part in parts]
            arrays["offset"][layer] = [part.offset for part in parts]
            arrays["stride"][layer] = [part.nbytes // n_experts for part in parts]
            types = [part.type for part in parts]
            arrays["qtypes"][layer] = [types[0], types[0], types[1]] if fused else types
        classes, layer_class = _size_classes(arrays["offset"], arrays["stride"], n_experts)
        return cls(
            n_layers=n_layers,
            n_experts=n_experts,
            part_names=names,
            shard_bytes=file.shard_bytes,
            shard=arrays["shard"].astype(np.int32),
            offset=arrays["offset"],
            stride=arrays["stride"],
            qtypes=arrays["qtypes"].astype(np.int32),
            layer_class=layer_class,
            classes=classes,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have experts, ascending."""
        return tuple(int(layer) for layer in np.flatnonzero(self.layer_class >= 0))

    def extents(self, layer: int, expert: int) -> tuple[Extent, ...]:
        """The extents of one expert, in the order of `part_names`."""
        self._check(layer, expert)
        return tuple(
            Extent(
                int(self.shard[layer, part]),
                int(self.offset[layer, part]) + expert * int(self.stride[layer, part]),
                int(self.stride[layer, part]),
            )
            for part in range(len(self.part_names))
        )

    def types(self, layer: int) -> tuple[GGMLType, GGMLType, GGMLType]:
        """The storage types of gate, up and down in `layer`."""
        self._check(layer, 0)
        gate, up, down = (GGMLType(int(each)) for each in self.qtypes[layer])
        return gate, up, down

    def size_class(self, layer: int) -> int:
        """The index into `classes` of `layer`'s slots."""
        self._check(layer, 0)
        return int(self.layer_class[layer])

    def slot_bytes(self, layer: int) -> int:
        """The size of a slot that holds an expert of `layer`."""
        return self.classes[self.size_class(layer)].slot_bytes

    def expert_bytes(self, layer: int) -> int:
        """The true bytes of one expert of `layer`, without the padding of its slot."""
        self._check(layer, 0)
        return int(self.stride[layer].sum())

    def part_offsets(self, layer: int, expert: int) -> tuple[int, int, int]:
        """Where gate, up and down of one expert begin in its slot, in bytes."""
        self._check(layer, expert)
        gate, up, down = (int(each) for each in self.part_offset_array(layer)[expert])
        return gate, up, down

    def part_offset_array(self, layer: int) -> npt.NDArray[np.int64]:
        """Where gate, up and down of each expert begin in its slot, in bytes: int64 [E, 3]."""
        self._check(layer, 0)
        areas = np.array(self.classes[self.layer_class[layer]].part_area_offsets, np.int64)
        experts = np.arange(self.n_experts, dtype=np.int64)[:, None]
        starts: npt.NDArray[np.int64]  # [E, P]
        starts = areas + (self.offset[layer] + experts * self.stride[layer]) % PAGE_BYTES
        if self.part_names == SEPARATE_PARTS:
            return starts
        half = self.stride[layer, 0] // 2
        return np.stack([starts[:, 0], starts[:, 0] + half, starts[:, 1]], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain msgpack types (arrays as little-endian bytes)."""
        return {
            "n_layers": self.n_layers,
            "n_experts": self.n_experts,
            "part_names": list(self.part_names),
            "shard_bytes": list(self.shard_bytes),
            "shard": self.shard.astype("<i4").tobytes(),
            "offset": self.offset.astype("<i8").tobytes(),
            "stride": self.stride.astype("<i8").tobytes(),
            "qtypes": self.qtypes.astype("<i4").tobytes(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertTable:
        """The table that `to_dict` described."""
        n_layers, names = data["n_layers"], tuple(data["part_names"])
        shape = (n_layers, len(names))
        offset = np.frombuffer(data["offset"], "<i8").astype(np.int64).reshape(shape)
        stride = np.frombuffer(data["stride"], "<i8").astype(np.int64).reshape(shape)
        classes, layer_class = _size_classes(offset, stride, data["n_experts"])
        return cls(
            n_layers=n_layers,
            n_experts=data["n_experts"],
            part_names=names,
            shard_bytes=tuple(data["shard_bytes"]),
            shard=np.frombuffer(data["shard"], "<i4").astype(np.int32).reshape(shape),
            offset=offset,
            stride=stride,
            qtypes=np.frombuffer(data["qtypes"], "<i4").astype(np.int32).reshape(n_layers, 3),
            layer_class=layer_class,
            classes=classes,
        )

    def _check(self, layer: int, expert: int) -> None:
        if not 0 <= layer < self.n_layers or self.layer_class[layer] < 0:
            raise IndexError(f"layer {layer} of {self.n_layers} has no experts")
        if not 0 <= expert < self.n_experts:
            raise IndexError(f"expert {expert} of layer {layer}: there are {self.n_experts}")


def _expert_layers(file: GGUFFile, n_layers: int | None) -> list[int]:
    """The layers that have an expert tensor of any part, below `n_layers`."""
    candidates = range(MAX_LAYERS if n_layers is None else n_layers)
    parts = (*SEPARATE_PARTS, "gate_up")
    return [
        layer
        for layer in candidates
        if any(tensor_name(layer, part) in file.tensors for part in parts)
    ]


def _empty_arrays(n_layers: int, n_parts: int) -> dict[str, npt.NDArray[np.int64]]:
    columns = {"shard": n_parts, "offset": n_parts, "stride": n_parts, "qtypes": 3}
    return {name: np.full((n_layers, width), -1, np.int64) for name, width in columns.items()}


def _check_shapes(file: GGUFFile, parts: list[TensorInfo], n_experts: int) -> None:
    """Refuse parts that do not fit together as [E, F, D] (twice F when fused) and [E, D, F]."""
    for part in parts:
        if len(part.shape) != 3:
            _refuse(file, part, f"{len(part.shape)} dimensions instead of 3")
        if n_experts and part.shape[0] != n_experts:
            _refuse(file, part, f"{part.shape[0]} experts, other layers have {n_experts}")
    first, down = parts[0], parts[-1]
    count, rows, width = first.shape
    if count > MAX_EXPERTS:
        _refuse(file, first, f"{count} experts, at most {MAX_EXPERTS} are supported")
    fused = len(parts) == 2
    if fused and rows % 2:
        _refuse(file, first, f"{rows} rows do not divide into gate and up")
    hidden = rows // 2 if fused else rows
    if not fused and parts[1].shape != first.shape:
        _refuse(file, parts[1], f"shape {parts[1].shape} instead of gate's {first.shape}")
    if down.shape != (count, width, hidden):
        _refuse(file, down, f"shape {down.shape} instead of {(count, width, hidden)}")


def _refuse(file: GGUFFile, part: TensorInfo, problem: str) -> None:
    raise GGUFError(
        file.shards[part.shard],
        part.name,
        part.offset,
        problem,
        "the file is damaged or of a kind that is not supported",
    )


def _size_classes(
    offset: npt.NDArray[np.int64], stride: npt.NDArray[np.int64], n_experts: int
) -> tuple[tuple[SizeClass, ...], npt.NDArray[np.int32]]:
    """Group layers whose experts have the same part sizes, in the order of their first layer."""
    layer_class = np.full(len(stride), -1, np.int32)
    areas: list[npt.NDArray[np.int64]] = []
    index: dict[tuple[int, ...], int] = {}
    experts = np.arange(n_experts, dtype=np.int64)[:, None]
    for layer in np.flatnonzero((stride > 0).all(axis=1)):
        key = tuple(int(each) for each in stride[layer])
        start = offset[layer] + experts * stride[layer]  # [E, P]
        end = -(-(start + stride[layer]) // PAGE_BYTES) * PAGE_BYTES
        need = (end - start // PAGE_BYTES * PAGE_BYTES).max(axis=0)
        if key in index:
            areas[index[key]] = np.maximum(areas[index[key]], need)
        else:
            index[key] = len(areas)
            areas.append(need)
        layer_class[layer] = index[key]
    classes = tuple(
        SizeClass(
            int(area.sum()),
            (0, *(int(each) for each in np.cumsum(area)[:-1])),
            tuple(int(layer) for layer in np.flatnonzero(layer_class == number)),
        )
        for number, area in enumerate(areas)
    )
    return classes, layer_class
