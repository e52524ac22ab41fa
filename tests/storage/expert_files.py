"""A small model of random experts in two files, and what each expert's bytes are."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from fomoe.gguf.extents import ExpertTable, tensor_name
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.storage.reader import DirectReader, _pread
from fomoe.storage.segment import Segment

LAYERS, EXPERTS = 3, 8


@dataclass(frozen=True)
class Model:
    file: GGUFFile
    table: ExpertTable

    @property
    def slot_bytes(self) -> int:
        return max(each.slot_bytes for each in self.table.classes)

    def parts(self, layer: int, expert: int) -> list[bytes]:
        """The expert's gate, up and down as they lie in the file."""
        return [
            self.file.read(tensor_name(layer, part)).reshape(EXPERTS, -1)[expert].tobytes()
            for part in self.table.part_names
        ]

    def in_slot(self, layer: int, expert: int, slot: np.ndarray) -> bool:
        """Whether `slot` holds this expert where the kernels will look for it."""
        offsets = self.table.part_offsets(layer, expert)
        return all(
            slot[offset : offset + len(part)].tobytes() == part
            for offset, part in zip(offsets, self.parts(layer, expert), strict=True)
        )


def write_model(folder: Path) -> Model:
    """Three layers of 8 experts; layer 2 has a larger down part; the file ends inside a page."""
    rng = np.random.default_rng(5)
    writer = GGUFWriter(folder / "model.gguf", "qwen35moe", split_max_tensors=5)
    for layer in range(LAYERS):
        for part in ("gate", "up", "down"):
            kind, shape = GGMLQuantizationType.Q4_K, (EXPERTS, 37, 144)
            if part == "down":
                # 37 columns divide into no block of 32
                width = 4 if layer == 2 else 2
                kind = GGMLQuantizationType.F32 if width == 4 else GGMLQuantizationType.F16
                shape = (EXPERTS, 256, 37 * width)
            data = rng.integers(0, 256, shape, dtype=np.uint8)
            writer.add_tensor(tensor_name(layer, part), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(sorted(folder.glob("*.gguf"))[0])
    return Model(file, ExpertTable.from_gguf(file))


def open_descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


ALL = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


def read_all(reader: DirectReader, model: Model, segment: Segment) -> None:
    """Read every expert and compare it with the file."""
    for layer, expert in ALL:
        slot = segment.view[: model.table.slot_bytes(layer)]
        slot[:] = 0xEE
        assert reader.read_expert(layer, expert, slot) == model.table.expert_bytes(layer)
        assert model.in_slot(layer, expert, slot)


def failing(*codes: int) -> Callable[[int, memoryview, int], int]:
    """A pread that fails with each code once and then works."""
    left = list(codes)

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        if left:
            code = left.pop(0)
            raise OSError(code, os.strerror(code))
        return _pread(fd, buffer, offset)

    return pread
