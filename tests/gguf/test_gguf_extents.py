"""Expert tables: extents against the tensors' own bytes, slot layouts, refusals."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from fomoe.errors import GGUFError
from fomoe.gguf.extents import FUSED_PARTS, PAGE_BYTES, SEPARATE_PARTS, ExpertTable, tensor_name
from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.gguf.reader import GGUFFile, open_gguf

E, F, D = 6, 32, 256
Parts = dict[str, tuple[tuple[int, ...], GGMLType]]
SEPARATE: Parts = {
    "gate": ((E, F, D), GGMLType.Q4_K),
    "up": ((E, F, D), GGMLType.Q5_K),
    "down": ((E, D, F), GGMLType.Q8_0),
}
FUSED: Parts = {"gate_up": ((E, 2 * F, D), GGMLType.Q4_K), "down": ((E, D, F), GGMLType.Q8_0)}


def write(path: Path, layers: dict[int, Parts], odd_bytes: int = 32) -> GGUFFile:
    """A file with the given expert tensors of random bytes, none of them on a page boundary."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "qwen35moe")
    writer.add_tensor("odd", np.zeros(odd_bytes // 4, np.float32))
    for layer, parts in layers.items():
        for part, (shape, qtype) in parts.items():
            width = row_bytes(qtype, shape[-1])
            data = rng.integers(0, 256, (*shape[:-1], width), dtype=np.uint8)
            kind = GGMLQuantizationType[qtype.name]
            writer.add_tensor(tensor_name(layer, part), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path)


@pytest.fixture(params=["separate", "fused"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> GGUFFile:
    parts = SEPARATE if request.param == "separate" else FUSED
    finer = parts | {"down": ((E, D, F), GGMLType.F16)}
    return write(tmp_path / "model.gguf", {1: parts, 2: finer, 4: parts})


def test_layers_and_classes(file: GGUFFile) -> None:
    table = ExpertTable.from_gguf(file, 6)
    assert table.n_layers == 6
    assert table.n_experts == E
    assert table.layers == (1, 2, 4)
    assert table.part_names == (FUSED_PARTS if len(table.part_names) == 2 else SEPARATE_PARTS)
    assert [each.layers for each in table.classes] == [(1, 4), (2,)]
    assert [table.size_class(layer) for layer in table.layers] == [0, 1, 0]
    assert ExpertTable.from_gguf(file).n_layers == 5
    assert table.types(2)[2] == GGMLType.F16
    fused = table.part_names == FUSED_PARTS
    assert table.types(1)[:2] == (GGMLType.Q4_K, GGMLType.Q4_K if fused else GGMLType.Q5_K)


def test_extents_are_the_experts_bytes(file: GGUFFile) -> None:
    table = ExpertTable.from_gguf(file)
    content = file.path.read_bytes()
    for layer in table.layers:
        for expert in range(E):
            extents = table.extents(layer, expert)
            assert sum(extent.nbytes for extent in extents) == table.expert_bytes(layer)
            for part, extent in zip(table.part_names, extents, strict=True):
                whole = file.read(tensor_name(layer, part))
                mine = whole.reshape(E, -1)[expert].tobytes()
                assert content[extent.offset : extent.offset + extent.nbytes] == mine


def test_every_superset_fits_its_area(file: GGUFFile) -> None:
    table = ExpertTable.from_gguf(file)
    for layer in table.layers:
        layout = table.classes[table.size_class(layer)]
        ends = (*layout.part_area_offsets[1:], layout.slot_bytes)
        assert all(each % PAGE_BYTES == 0 for each in (*layout.part_area_offsets, *ends))
        slack = []
        for expert in range(E):
            for part, extent in enumerate(table.extents(layer, expert)):
                lead = extent.offset % PAGE_BYTES
                pages = -(-(lead + extent.nbytes) // PAGE_BYTES) * PAGE_BYTES
                slack.append(ends[part] - layout.part_area_offsets[part] - pages)
        assert min(slack) >= 0
        # an area is never more than a page larger than what some expert needs
        assert max(slack) <= PAGE_BYTES


def test_part_offsets(file: GGUFFile) -> None:
    table = ExpertTable.from_gguf(file)
    for layer in table.layers:
        areas = table.classes[table.size_class(layer)].part_area_offsets
        offsets = table.part_offset_array(layer)
        assert offsets.shape == (E, 3)
        assert offsets.dtype == np.int64
        for expert in range(E):
            starts = [
                area + extent.offset % PAGE_BYTES
                for area, extent in zip(areas, table.extents(layer, expert), strict=True)
            ]
            if table.part_names == FUSED_PARTS:
                starts.insert(1, starts[0] + table.extents(layer, expert)[0].nbytes // 2)
            assert table.part_offsets(layer, expert) == tuple(starts)
            assert offsets[expert].tolist() == starts


def test_round_trip(file: GGUFFile) -> None:
    msgpack = pytest.importorskip("msgpack")
    table = ExpertTable.from_gguf(file, 6)
    back = ExpertTable.from_dict(msgpack.unpackb(msgpack.packb(table.to_dict())))
    assert back.classes == table.classes
    assert back.shard_bytes == table.shard_bytes
    assert back.layers == table.layers
    for layer in table.layers:
        assert back.types(layer) == table.types(layer)
        for expert in range(E):
            assert back.extents(layer, expert) == table.extents(layer, expert)
            assert back.part_offsets(layer, expert) == table.part_offsets(layer, expert)


def test_a_dense_model_has_an_empty_table(tmp_path: Path) -> None:
    table = ExpertTable.from_gguf(write(tmp_path / "model.gguf", {}), 4)
    assert (table.n_layers, table.n_experts, table.layers, table.classes) == (4, 0, (), ())
    assert ExpertTable.from_dict(table.to_dict()).n_layers == 4


@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (5, 0), (-1, 0), (1, E), (1, -1)])
def test_out_of_range(file: GGUFFile, layer: int, expert: int) -> None:
    with pytest.raises(IndexError):
        ExpertTable.from_gguf(file).extents(layer, expert)


MANY: Parts = {
    "gate": ((4097, 1, 32), GGMLType.Q8_0),
    "up": ((4097, 1, 32), GGMLType.Q8_0),
    "down": ((4097, 32, 1), GGMLType.F32),
}


def changed(part: str, shape: tuple[int, ...]) -> dict[int, Parts]:
    return {0: SEPARATE, 1: SEPARATE | {part: (shape, GGMLType.Q8_0)}}


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({0: {"gate": SEPARATE["gate"], "down": SEPARATE["down"]}}, "ffn_up_exps"),
        ({0: {"gate_up": FUSED["gate_up"]}}, "ffn_down_exps"),
        ({0: SEPARATE, 1: FUSED}, "blk.0.ffn_gate_up_exps"),
        ({0: {"gate_up": ((E, 63, D), GGMLType.Q4_K), "down": SEPARATE["down"]}}, "63 rows"),
        (changed("gate", (E + 1, F, D)), "7 experts, other layers have 6"),
        (changed("up", (E, F + 1, D)), "instead of gate's"),
        (changed("down", (E, D, 2 * F)), "instead of"),
        (changed("down", (D, F)), "2 dimensions instead of 3"),
        ({0: MANY}, "at most 4096"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, layers: dict[int, Parts], problem: str
) -> None:
    file = write(tmp_path / "model.gguf", layers)
    with pytest.raises(GGUFError, match=problem):
        ExpertTable.from_gguf(file)


def test_aligned_experts_need_no_extra_page(tmp_path: Path) -> None:
    # 32 rows of 4096 weights in Q4_K are 18 pages, 4096 rows of 32 weights in Q8_0 are 34
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen35moe")
    writer.add_custom_alignment(PAGE_BYTES)
    for part in SEPARATE_PARTS:
        shape = (2, 4096, 34) if part == "down" else (2, 32, 2304)
        kind = GGMLQuantizationType.Q8_0 if part == "down" else GGMLQuantizationType.Q4_K
        writer.add_tensor(tensor_name(0, part), np.zeros(shape, np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    table = ExpertTable.from_gguf(open_gguf(path))
    assert table.slot_bytes(0) == table.expert_bytes(0) == (18 + 18 + 34) * PAGE_BYTES
