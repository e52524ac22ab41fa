"""A GPU's streams whose work happens when a test says so, in any order that streams allow."""

import ctypes
from collections import deque
from types import SimpleNamespace

import numpy as np
from support.simulated_gpu import Storage
from support.simulated_machine import DEMAND, Machine

from fomoe.actors.expert_copies import ExpertCopies, Source
from fomoe.engine.copies import COPY

PART = 8  # bytes of each part of an expert
OFFSETS = (0, 256, 512)  # of parts in a VRAM slot
COMPUTE = 1


class Streams:
    """The part of a driver that copies use; `actions` are what could happen next."""

    def __init__(self):
        self.queues = {COMPUTE: deque()}
        self.recorded, self.happened = {}, {}  # by event: how often

    def stream(self):
        self.queues[len(self.queues) + 1] = deque()
        return len(self.queues)

    def event(self, timing=False):
        event = len(self.recorded) + 1
        self.recorded[event] = self.happened[event] = 0
        return event

    def record(self, event, stream):
        self.recorded[event] += 1
        turn = self.recorded[event]
        self.put(stream, lambda: self.happened.__setitem__(event, max(turn, self.happened[event])))

    def wait(self, event, stream):
        turn = self.recorded[event]
        assert turn, "a wait for what nobody has recorded"
        self.queues[stream].append((lambda: self.happened[event] >= turn, lambda: None))

    def done(self, event):
        return self.happened[event] >= self.recorded[event]

    def copy(self, to, source, nbytes, stream):
        self.put(stream, lambda: ctypes.memmove(to, source, nbytes))

    def put(self, stream, work):
        self.queues[stream].append((lambda: True, work))

    def actions(self):
        return [
            lambda queue=queue: self._step(queue)
            for queue in self.queues.values()
            if queue and queue[0][0]()
        ]

    def _step(self, queue):
        queue.popleft()[1]()


class Cells:
    """Slots of real bytes, whose content is the expert that all three parts are of."""

    def __init__(self, nbytes, n_experts):
        self.bytes = np.zeros(nbytes + PART, np.uint8)
        self.base = self.bytes.ctypes.data
        self._n = n_experts

    def put(self, at, key):
        for part, offset in enumerate(OFFSETS):
            tag = -1 if key is None else 4 * (key[0] * self._n + key[1]) + part
            self.bytes[at + offset : at + offset + PART].view(np.int64)[0] = tag

    def get(self, at):
        tags = [int(self.bytes[at + o : at + o + PART].view(np.int64)[0]) for o in OFFSETS]
        if tags[0] < 0 or tags != [tags[0] + part for part in range(3)]:
            return None
        return divmod(tags[0] // 4, self._n)


class ByteMemory:
    """A node's segment; see `simulated_gpu.Memory`."""

    def __init__(self, segment):
        self.word = np.zeros(segment.n_slots, np.uint64)
        self.cells = Cells(segment.nbytes, segment.slot_of.shape[1])
        self._address = segment.address
        self.content = self
        for at in segment.address.tolist():
            self.cells.put(at, None)

    def __setitem__(self, slot, key):
        self.cells.put(int(self._address[slot]), key)

    def __getitem__(self, slot):
        return self.cells.get(int(self._address[slot]))


class ActorGpu:
    """`ExpertCopies` and a device that computes; see `simulated_gpu.Gpu`."""

    def __init__(self, memory, topology, number):
        self.class_of = topology.layer_class.tolist().__getitem__
        pools = [(c, n) for (d, c), n in sorted(topology.device_slots.items()) if d == number]
        self._first, count = {}, 0
        for size_class, n in pools:
            self._first[size_class] = count
            count += n
        self.cells = Cells(1024 * count, topology.n_experts)
        for slot in range(count):
            self.cells.put(1024 * slot, None)
        self.streams, self.content = Streams(), self
        self.table = {}
        n_layers = topology.n_layers
        offsets = np.tile(np.array(OFFSETS), (topology.n_experts, 1))
        layout = SimpleNamespace(
            n_layers=n_layers, stride=np.full((n_layers, 3), PART),
            part_offset_array=lambda layer: offsets,
        )  # fmt: skip
        source = Source(memory.word, memory.cells.base)
        self.executor = ExpertCopies(self.streams, self, source, layout)
        self.steps, self._uid = deque(), 0

    # What `Slots` has.

    def layout(self, layer):
        return SimpleNamespace(offsets=OFFSETS)

    def slot_address(self, size_class, slot):
        return self.cells.base + 1024 * (self._first[size_class] + slot)

    def set(self, layer, expert, slot):
        self.table[layer, expert] = slot

    def publish(self, layer=None):
        pass

    # What `Gpu` has.

    def get(self, at):
        return self.cells.get(self.slot_address(*at) - self.cells.base)

    def __getitem__(self, at):
        return self.get(at)

    @property
    def answers(self):
        return self.executor.ended

    @property
    def copies(self):
        return self.executor.is_busy

    def order(self, records):
        self.executor.order(records)

    def start(self, step_id, layer, entries, records, *, adds):
        self._uid += 1
        step = SimpleNamespace(
            id=step_id, uid=self._uid, layer=layer, entries=entries.copy(), aborted=False,
            hits=entries[:0] if adds else None, rest=entries.copy(), queued=False, computed=[],
        )  # fmt: skip
        self.steps.append(step)
        self.executor.order(records, step.uid)

    def abort(self, step_id):
        for step in self.steps:
            if step.id == step_id and not step.queued:
                step.aborted = True
                self.executor.abort(step.uid)

    def take_answers(self):
        records, self.executor.ended = self.executor.ended, []
        return np.array(records, COPY)

    def actions(self):
        moves = self.streams.actions()
        if self.executor.is_busy or (self.steps and not self.steps[0].queued):
            moves.append(self._look)
        return moves

    def _look(self):
        self.executor.advance()
        step = self.steps[0] if self.steps else None
        if not step or step.queued or step.aborted:
            return
        if step.hits is None:
            late = self.executor.late(step.uid, step.entries["expert"])
            step.hits, step.rest = step.entries[~late], step.entries[late]
            self.streams.put(COMPUTE, lambda: self._compute(step, step.hits))
        if self.executor.has_begun(step.uid):
            self.executor.hold(step.uid, COMPUTE)
            self.streams.put(COMPUTE, lambda: self._compute(step, step.rest))
            step.queued = True

    def _compute(self, step, entries):
        self._check(step.layer, entries)
        step.computed += entries["expert"].tolist()

    def _check(self, layer, entries):
        for entry in entries:
            key = layer, int(entry["expert"])
            at = self.class_of(layer), int(entry["slot"])
            assert self.get(at) == key
            assert self.table[key] == entry["slot"]

    def done(self):
        if not self.steps:
            return None
        step = self.steps[0]
        wanted = step.entries if not step.aborted else step.hits
        is_over = wanted is None or len(step.computed) == len(wanted)
        if not is_over or not self.executor.has_ended(step.uid):
            return None
        if wanted is not None:
            self._check(step.layer, wanted)  # nobody has touched what was being read
        self.steps.popleft()
        return step.id, step.aborted, list(step.computed)


class ActorMachine(Machine):
    """The simulated driver over the executor of real devices."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        memories = [ByteMemory(segment) for segment in self.segments]
        self.storages = [Storage(memory, DEMAND) for memory in memories]
        nodes = self.topology.device_node
        self.gpus = [ActorGpu(memories[n], self.topology, d) for d, n in enumerate(nodes)]
