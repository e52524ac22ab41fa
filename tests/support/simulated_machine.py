"""The driver's loop over simulated storage and GPUs: plans, waves, guesses, failed reads, prompts."""

import numpy as np

from fomoe.engine.ahead import AheadArrays
from fomoe.engine.gpu_segment import GpuSegment, VramLayout
from fomoe.engine.transfers import ENTRY, READ
from fomoe.engine.waves import Priorities, StepArrays, WaveLayout, WavePlanner
from fomoe.residency import Residency, Topology
from fomoe.routing import route_exact
from fomoe.types import ExpertKey, Tier
from support.simulated_gpu import Gpu, Memory, Storage

MAX_TOKENS = 4
DEMAND, PREFETCH, BACKGROUND = 0, 1, 3


def draw_topology(rng, *, most_devices=3):
    """A small model on GPUs; pools hold a token's experts of each class, most of them little more."""
    n_layers, n_experts = int(rng.integers(1, 6)), int(rng.integers(5, 24))
    top_k = int(rng.integers(1, min(n_experts, 6)))
    device_node = [(0,), (0, 0), (0, 1), (0, 1, 0)][rng.integers(4)][:most_devices]
    layer_device = (np.arange(n_layers) % len(device_node)).astype(np.int32)
    layer_class = rng.integers(0, 2, n_layers).astype(np.int32)
    pools = sorted(set(zip(layer_device.tolist(), layer_class.tolist(), strict=True)))
    nodes = sorted({(device_node[d], c) for d, c in pools})
    return top_k, Topology(
        n_layers=n_layers, n_experts=n_experts, layer_device=layer_device,
        layer_class=layer_class, device_node=device_node,
        device_slots={p: top_k + int(rng.integers(0, 2 * n_experts)) for p in pools},
        ram_slots={p: int(rng.integers(0, 2 * n_experts)) for p in nodes},
    )  # fmt: skip


def gpu_segments(topology, staging):
    """As `EnginePlan.segment_slots` lays them out, with so many staging slots of each class."""
    segments = []
    for node in range(max(topology.device_node) + 1):
        pools = {p: n for p, n in topology.device_slots.items()
                 if topology.device_node[p[0]] == node}  # fmt: skip
        classes = {c: (topology.ram_slots.get((node, c), 0) + staging, 4096 * (1 + c))
                   for c in {c for _, c in pools}}  # fmt: skip
        layout = VramLayout(pools, topology.layer_device, layer_bytes(topology),
                            dict.fromkeys(classes, staging))  # fmt: skip
        segments.append(GpuSegment(classes, topology.layer_class, topology.n_experts, layout))
    return segments


def layer_bytes(topology):
    return 1000 + topology.layer_class.astype(np.int64)


class StepMemory:
    """The arrays of one step."""

    def __init__(self, top_k, n_experts):
        pairs, most = MAX_TOKENS * top_k, min(MAX_TOKENS * top_k, n_experts)
        self.entries = np.zeros(most, ENTRY)
        self.arrays = StepArrays(
            np.zeros((MAX_TOKENS, top_k), np.int32), np.zeros((MAX_TOKENS, top_k), np.float32),
            np.zeros(pairs, np.int32), np.zeros(most + 1, np.int32), self.entries,
        )  # fmt: skip


class Machine:
    """One driver, its nodes and devices; `chance` draws what happens next."""

    def __init__(self, chance, policy, ram, *, staging, arm=False, fails=0.0):
        self.rng, self.fails = chance, fails
        self.top_k, self.topology = draw_topology(chance)
        t = self.topology
        self.residency = Residency(t, policy, ram)
        self.segments = gpu_segments(t, staging)
        node = np.array([t.device_node[d] for d in t.layer_device], np.int32)
        ahead = AheadArrays(t.n_layers, t.n_experts, 1.0)
        ahead.allowed[:] = True
        ahead.credit[0] = 1 << 40
        self.planner = WavePlanner(
            self.residency, self.segments, WaveLayout(
                layer_node=node, layer_device=t.layer_device, expert_bytes=layer_bytes(t)),
            Priorities(DEMAND, PREFETCH, BACKGROUND), ahead,
            max_tokens=MAX_TOKENS, top_k=self.top_k,
        )  # fmt: skip
        if arm:
            self.planner.arrays.arm[:] = (np.arange(self.top_k + 1) + 1) // 2
        memories = [Memory(s.n_slots) for s in self.segments]
        self.storages = [Storage(memory, DEMAND) for memory in memories]
        self.gpus = [Gpu(memories[n], t.layer_class.tolist().__getitem__) for n in t.device_node]
        self.node = node.tolist()
        self.device = t.layer_device.tolist()
        self.step = StepMemory(self.top_k, t.n_experts)
        self.step_id = 0
        self.computed = []  # of the last step
        self.wanted = (-1, ())
        self.aborted = False
        self.popularity = 2 * chance.normal(size=(t.n_layers, t.n_experts))

    def scores(self, layer, tokens):
        noise = self.rng.normal(size=(tokens, self.topology.n_experts))
        return (self.popularity[layer] + noise).astype(np.float32)

    # What the world does.

    def tick(self):
        """Let one thing happen; False when nothing can."""
        moves = [(gpu, move) for gpu in self.gpus for move in gpu.actions()]
        moves += [(s, move) for s in self.storages for move in s.actions()]
        if not moves:
            return False
        whose, move = moves[self.rng.integers(len(moves))]
        failed = move()
        if failed is not None:
            self.fail(self.storages.index(whose), failed)
        return True

    def fail(self, node, report):
        """As `Reads`: what waits for the read gives up, what nobody waits for is forgotten."""
        layer, expert, generation = report
        key = ExpertKey(layer, expert)
        if not self.segments[node].is_current(key, generation):
            return
        is_wanted = self.wanted[0] == layer and expert in self.wanted[1]
        self.planner.forget(key)
        self.cancel()
        if is_wanted:
            self.aborted = True
            self.gpus[self.device[layer]].abort(self.step_id)

    def send_reads(self, layer, reads):
        """Send READ records; failures are drawn for demanded ones."""
        storage = self.storages[self.node[layer]]
        for r in reads:
            if self.rng.random() < self.fails:
                storage.failing.add((int(r["layer"]), int(r["expert"])))
        self.drop(self.node[layer], storage.ask(reads))

    def drop(self, node, dropped):
        for layer, expert, generation in dropped:
            key = ExpertKey(layer, expert)
            is_mine = self.segments[node].is_current(key, generation)
            if is_mine and self.planner.arrays.unproven[layer, expert] != Tier.DEVICE:
                self.planner.forget(key)
        self.cancel()

    def cancel(self):
        for device, gpu in enumerate(self.gpus):
            gpu.order(self.planner.take_cancelled(device))

    def hear(self):
        for gpu in self.gpus:
            if self.rng.random() < 0.1:
                gpu.shed(self.rng)
            self.planner.ended(gpu.take_answers())

    # What the driver does.

    def decode(self, layer, tokens=1):
        """A step of a layer, wave by wave, with guesses for others meanwhile."""
        route = route_exact(self.scores(layer, tokens), self.top_k)
        self.computed, self.aborted = [], False
        self.send_wave(layer, self.planner.place(layer, route, self.step.arrays))
        if self.rng.random() < 0.3:
            dropped = self.storages[self.node[layer]].drop(layer)
            self.drop(self.node[layer], dropped)
        if self.rng.random() < 0.7:
            self.guess((layer + 1 + int(self.rng.integers(2))) % self.topology.n_layers)
        if self.rng.random() < 0.2:
            some = self.rng.permutation(self.topology.n_experts)[: self.top_k].astype(np.int32)
            n = self.planner.read_later(layer, some)
            self.send_ahead(layer, n)
        while self.await_done(layer):
            self.residency.release(layer)
            if self.planner.end == self.planner.n_experts:
                assert sorted(self.computed) == np.unique(route.ids).tolist()
                return
            self.send_wave(layer, self.planner.wave())
        self.residency.release(layer)

    def send_wave(self, layer, n_reads):
        planner = self.planner
        self.step_id += 1
        entries = self.step.entries[planner.first : planner.end]
        self.wanted = layer, entries["expert"].tolist()
        self.send_reads(layer, planner.arrays.reads[:n_reads].copy())
        self.gpus[self.device[layer]].start(
            self.step_id, layer, entries, planner.step_copies, adds=False
        )

    def guess(self, layer):
        self.send_ahead(layer, self.planner.look_ahead(layer, self.scores(layer, 1)))

    def send_ahead(self, layer, n_reads):
        copies = self.planner.ahead_copies.copy()
        self.send_reads(layer, self.planner.arrays.reads[:n_reads].copy())
        self.gpus[self.device[layer]].order(copies)

    def await_done(self, layer):
        """Wait for the wave; False when it was given up."""
        while (done := self.gpus[self.device[layer]].done()) is None:
            assert self.tick(), "nothing can happen and the step is not done"
            if self.rng.random() < 0.3:
                self.hear()
        assert done[:2] == (self.step_id, self.aborted)
        self.computed += done[2]
        self.wanted = -1, ()
        self.planner.answered(aborted=self.aborted)
        self.cancel()
        return not self.aborted

    def come_to_rest(self):
        """Let everything end that has begun, and check that nothing is lost."""
        while self.tick():
            pass
        while any(gpu.copies for gpu in self.gpus):  # reads that were dropped: nobody brings them
            for gpu in self.gpus:
                gpu.shed(self.rng)
        for gpu in self.gpus:
            self.planner.ended(gpu.take_answers())
        self.cancel()
        self.residency.check_integrity()
        self.nothing_is_lost()

    def nothing_is_lost(self):
        """Every slot is free or held for the RAM tier; every expert is where the tables say."""
        t = self.topology
        for node, segment in enumerate(self.segments):
            assert not segment.users.any()
            assert not segment.ahead.any()
            used = []
            for layer in (i for i in range(t.n_layers) if self.node[i] == node):
                for expert in range(t.n_experts):
                    key = ExpertKey(layer, expert)
                    slot = int(segment.slot_of[layer, expert])
                    assert (slot >= 0) == self.residency.is_in_ram(key)
                    if slot >= 0:
                        used.append(slot)
                    if (vram := self.residency.device_slot(key)) >= 0:
                        assert segment.is_in_vram(key, self.residency)
                        at = int(t.layer_class[layer]), vram
                        assert self.gpus[self.device[layer]].content[at] == (layer, expert)
            free = [
                slot
                for first, count in zip(segment.class_first, segment.free_count, strict=True)
                for slot in segment.free_slots[first : first + count].tolist()
            ]
            assert sorted(used + free) == list(range(segment.n_slots))


def read_records(reads, layer_device, priority):
    """`Read` objects as storage takes them."""
    rows = [
        (r.address, r.generation, r.slot, r.expert.layer, r.expert.expert, priority,
         layer_device[r.expert.layer], 0)
        for r in reads
    ]  # fmt: skip
    return np.array(rows, READ)
