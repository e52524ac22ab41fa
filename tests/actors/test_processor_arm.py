"""Storage's side of an arm: what it computes, in what order, and what it waits for."""

from types import SimpleNamespace

import numpy as np
import pytest

from fomoe.actors import processor_arm
from fomoe.actors.expert_parts import part_bytes
from fomoe.actors.messages import ARM
from fomoe.actors.processor_arm import ArmPlace, ArmPlan, ArmSegment, ProcessorArm
from fomoe.engine.transfers import ENTRY
from fomoe.errors import StorageError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.kernels import reference
from fomoe.model.archs import read_spec

LAYER, GENERATION = 1, 7
PLACE = ArmPlace("gpu-0", "step-0", 64, 4096, 8192)


class Desk:
    """A processor's arm over experts 1, 4 and 6 of a layer in slots 2, 0 and 1."""

    def __init__(self, path):
        file = open_gguf(path)
        self.spec = spec = read_spec(file)
        table = ExpertTable.from_gguf(file, spec.n_layers)
        each = table.slot_bytes(LAYER)
        self.arena, self.rung = np.zeros(12288, np.uint8), []
        memory = np.zeros(3 * each, np.uint8)
        self.landed = np.full(3, GENERATION, np.uint64)
        self.entries = np.array(
            [(slot * each, GENERATION, slot, expert) for slot, expert in ((2, 1), (0, 4), (1, 6))],
            ENTRY,
        )
        self.pool = []
        for address, _, _, expert in self.entries.tolist():
            parts = []
            for name, offset, nbytes in zip(
                ("gate", "up", "down"), table.part_offset_array(LAYER)[expert],
                part_bytes(table, LAYER), strict=True,
            ):  # fmt: skip
                tensor = file.read(f"blk.{LAYER}.ffn_{name}_exps.weight").reshape(-1)
                part = tensor[expert * nbytes : (expert + 1) * nbytes]
                memory[address + offset :][:nbytes] = part
                parts.append(part)
            self.pool.append(self.expert(table, parts))
        fabric = SimpleNamespace(
            arena=lambda name: self.arena, bell=lambda: 0, wait=lambda *args: True,
            ring=self.rung.append,
        )  # fmt: skip
        plan = ArmPlan(
            (PLACE,), spec.hidden, spec.moe.expert_width, spec.moe.top_k, int8=False, threads=1
        )
        segment = ArmSegment(self.landed, memory.ctypes.data)
        self.arm, self._memory = ProcessorArm(plan, table, segment, fabric), memory
        self.x = np.random.default_rng(1).normal(size=(1, spec.hidden)).astype(np.float32)
        self.arena[64:].view(np.float32)[: spec.hidden] = self.x

    def expert(self, table, parts):
        width, hidden = self.spec.moe.expert_width, self.spec.hidden
        rows = (width, width, hidden)
        cut = [part.reshape(n, -1) for part, n in zip(parts, rows, strict=True)]
        return reference.Expert(*cut, tuple(map(int, table.types(LAYER))))

    def ask(self, step, count, weights=(0.5, 0.3, 0.2)):
        head = ARM.pack(step, LAYER, 0, count)
        body = np.array(weights[:count], np.float32).tobytes() + self.entries[:count].tobytes()
        self.arm.take(np.frombuffer(head + body, np.uint8))

    @property
    def word(self):
        return int(self.arena[8192:8200].view(np.uint64)[0])

    @property
    def sum(self):
        return self.arena[4096:].view(np.float32)[: self.spec.hidden].copy()

    def expected(self, count, weights=(0.5, 0.3, 0.2)):
        pairs = np.arange(count + 1, dtype=np.int32), np.zeros(count, np.int32)
        chosen = np.array(weights[:count], np.float32)
        return reference.experts_sum(self.pool[:count], self.x, *pairs, chosen)[0]


@pytest.fixture
def desk(model_paths):
    return Desk(model_paths["small"])


@pytest.mark.parametrize("count", [1, 3])
def test_the_weighted_sum_goes_into_the_arena_and_then_its_word(desk, count):
    desk.ask(5, count)
    assert desk.arm.advance()
    np.testing.assert_allclose(desk.sum, desk.expected(count), rtol=1e-4, atol=1e-6)
    assert (desk.word, desk.rung, desk.arm.experts) == (5, ["gpu-0"], count)
    assert not desk.arm.advance()


def test_it_waits_for_bytes_and_keeps_the_order(desk):
    desk.landed[0] = GENERATION - 1  # of the second expert
    desk.ask(5, 2)
    desk.ask(6, 1)
    assert desk.arm.advance()
    assert (desk.word, desk.rung) == (0, [])
    desk.landed[0] = GENERATION
    assert desk.arm.advance()
    assert desk.word == 5
    assert desk.arm.advance()
    assert desk.word == 6
    np.testing.assert_allclose(desk.sum, desk.expected(1), rtol=1e-4, atol=1e-6)


def test_what_is_given_up_is_answered_and_not_computed(desk):
    desk.landed[:] = 0
    desk.ask(5, 1)
    desk.ask(6, 1)
    desk.ask(9, 1)
    desk.arm.give_up(6)
    assert (desk.word, desk.arm.experts) == (6, 0)
    desk.landed[:] = GENERATION
    assert desk.arm.advance()
    assert desk.word == 9


def test_bytes_that_never_come_are_an_error(desk, monkeypatch):
    monkeypatch.setattr(processor_arm, "_BOUND_S", -1.0)
    desk.landed[2] = 0
    desk.ask(5, 2)
    with pytest.raises(StorageError, match=r"layer 1: experts \[1\] have not come into RAM"):
        desk.arm.advance()
