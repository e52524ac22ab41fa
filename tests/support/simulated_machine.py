"""The driver's loop over simulated storage and GPUs: plans, waves, guesses, failed reads."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from support.simulated_gpu import Gpu, Memory, Storage

from fomoe.engine.ahead import AheadArrays
from fomoe.engine.gpu_segment import GpuSegment, VramLayout
from fomoe.engine.gpu_sweep import order_again, order_guess, order_wave
from fomoe.engine.transfers import ENTRY, READ
from fomoe.engine.waves import Priorities, StepArrays, WaveLayout, WavePlanner
from fomoe.residency import ChunkUse, Residency, Sweep, Topology
from fomoe.routing import group_by_expert, route_exact
from fomoe.types import ExpertKey, Tier

MAX_TOKENS = 4
DEMAND, PREFETCH, BACKGROUND = 0, 1, 3


def draw_topology(rng, *, most_devices=3):
    """A small model on GPUs; pools hold a token's experts of each class, or some more."""
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


@dataclass
class Wave:
    """A wave that a device has not answered."""

    id: int
    layer: int
    experts: list[int]
    is_last: bool
    aborted: bool = False
    all_computed: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)  # of the whole step


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
        self.haste = chance.choice([1.0, 0.1])  # of storage, beside the GPUs
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
        self.open = {}  # the wave under way, by device
        self.reports = deque()  # of storage, in order
        self.popularity = 2 * chance.normal(size=(t.n_layers, t.n_experts))

    def scores(self, layer, tokens):
        noise = self.rng.normal(size=(tokens, self.topology.n_experts))
        return (self.popularity[layer] + noise).astype(np.float32)

    # What the world does.

    def tick(self):
        """Let one thing happen; False when nothing can."""
        moves = [(gpu, move) for gpu in self.gpus for move in gpu.actions()]
        if not moves or self.rng.random() < self.haste:
            moves += [(s, move) for s in self.storages for move in s.actions()]
        if not moves:
            return False
        whose, move = moves[self.rng.integers(len(moves))]
        failed = move()
        if failed is not None:
            self.reports.append((self.fail, self.storages.index(whose), failed))
        return True

    def go_on(self):
        """Let something happen while the driver waits."""
        moved = self.tick()
        is_told = bool(self.reports) or any(gpu.answers for gpu in self.gpus)
        assert moved or is_told, "nothing can happen and the step is not done"
        if not moved or self.rng.random() < 0.3:
            self.hear()

    def fail(self, node, report):
        """As `Reads`: what waits for the read gives up, what nobody waits for is forgotten."""
        (layer, expert, slot, generation), is_prefetch = report
        key = ExpertKey(layer, expert)
        wave = self.open.get(self.device[layer])
        is_wanted = wave is not None and wave.layer == layer and expert in wave.experts
        is_mine = self.segments[node].is_current(key, slot, generation)
        if not is_mine or (is_wanted and is_prefetch):  # it was asked for again, as demand
            return
        self.planner.forget(key)
        self.cancel()
        if is_wanted:
            wave.aborted = True
            self.gpus[self.device[layer]].abort(wave.id)

    def send_reads(self, layer, reads):
        """Send READ records; failures are drawn for demanded ones."""
        storage = self.storages[self.node[layer]]
        for r in reads:
            if self.rng.random() < self.fails:
                storage.failing.add((int(r["layer"]), int(r["expert"])))
        self.drop(self.node[layer], storage.ask(reads))

    def drop(self, node, dropped):
        """Storage reports reads that it dropped; the driver hears of it later."""
        self.reports += [(self.forget_dropped, node, report) for report in dropped]

    def forget_dropped(self, node, report):
        layer, expert, slot, generation = report
        key = ExpertKey(layer, expert)
        is_mine = self.segments[node].is_current(key, slot, generation)
        if is_mine and self.planner.arrays.unproven[layer, expert] != Tier.DEVICE:
            self.planner.forget(key)
            self.cancel()

    def cancel(self):
        for device, gpu in enumerate(self.gpus):
            gpu.order(self.planner.take_cancelled(device))

    def hear(self):
        for gpu in self.gpus:
            self.planner.ended(gpu.take_answers())
        while self.reports:
            take, node, report = self.reports.popleft()
            take(node, report)

    # What the driver does.

    def decode(self, layer, tokens=1):
        """A step of a layer, wave by wave, with guesses for others meanwhile.

        The last wave may stay under way while the next layer begins on another device.
        """
        device = self.device[layer]
        self.finish(device)
        while self.planner.is_tight(layer):
            self.finish(next(iter(self.open)))
        route = route_exact(self.scores(layer, tokens), self.top_k)
        self.send_wave(layer, self.planner.place(layer, route, self.step.arrays))
        if self.rng.random() < 0.3:
            dropped = self.storages[self.node[layer]].drop(layer)
            self.drop(self.node[layer], dropped)
        if self.rng.random() < 0.7:
            self.guess((layer + 1 + int(self.rng.integers(2))) % self.topology.n_layers)
        if self.rng.random() < 0.2:
            some = self.rng.permutation(self.topology.n_experts)[: self.top_k].astype(np.int32)
            self.send_ahead(layer, self.planner.read_later(layer, some))
        while not self.open[device].is_last:
            wave = self.finish(device)
            if wave.aborted:
                return
            while self.planner.is_tight(layer):
                self.finish(next(iter(self.open)))
            self.send_wave(layer, self.planner.wave(), wave.all_computed)
        self.open[device].wanted = np.unique(route.ids).tolist()
        if self.rng.random() < 0.5:
            self.finish(device)

    def send_wave(self, layer, n_reads, computed=()):
        planner = self.planner
        self.step_id += 1
        entries = self.step.entries[planner.first : planner.end]
        self.open[self.device[layer]] = Wave(
            self.step_id, layer, entries["expert"].tolist(), planner.end == planner.n_experts,
            all_computed=list(computed),
        )  # fmt: skip
        self.send_reads(layer, planner.arrays.reads[:n_reads].copy())
        self.gpus[self.device[layer]].start(
            self.step_id, layer, entries, planner.step_copies, adds=False
        )

    def prompt(self, tokens):
        """A chunk of a prompt through all layers, with guesses at the next layer's experts."""
        for device in list(self.open):
            self.finish(device)
        self.hear()
        for layer in range(self.topology.n_layers):
            if not self.sweep(layer, tokens):
                return

    def sweep(self, layer, tokens):
        """A layer's sweep; False when it was given up."""
        device, segment = self.device[layer], self.segments[self.node[layer]]
        groups = group_by_expert(route_exact(self.scores(layer, tokens), self.top_k).ids)
        last = groups.pair_token[groups.pair_start[1:] - 1].astype(np.int64)
        use = ChunkUse(tokens, groups.experts, np.diff(groups.pair_start).astype(np.int64), last)
        sweep = Sweep(self.residency, layer, use, borrows=True)
        self.step_id += 1
        wave = Wave(self.step_id, layer, use.experts.tolist(), is_last=True)
        self.open[device] = wave
        flying, computed = deque(), []
        again = order_again(segment, sweep)
        self.planner.arrays.unproven[layer, use.experts] = Tier.DEVICE
        self.send_reads(layer, read_records(again, self.device, DEMAND))
        while not sweep.is_done:
            while not wave.aborted and self.send_sweep(sweep, wave, flying):
                pass
            if self.rng.random() < 0.5:
                self.guess_at(sweep, (layer + 1) % self.topology.n_layers)
            done = self.gpus[device].done()
            if done is not None:
                end, copies = flying.popleft()
                segment.end_all(copies, self.residency, aborted=done[1])
                if not done[1]:
                    sweep.computed(end)
                    computed += done[2]
            elif wave.aborted and not flying:
                break
            else:
                self.go_on()
        del self.open[device]
        sweep.abandon()
        assert wave.aborted or computed == use.experts.tolist()
        return not wave.aborted

    def send_sweep(self, sweep, wave, flying):
        segment = self.segments[self.node[wave.layer]]
        part = sweep.next_wave(4, segment.read_room(wave.layer, self.residency))
        if part is None:
            return False
        orders = order_wave(segment, self.residency, sweep, part)
        flying.append((part.end, orders.copies))
        gpu = self.gpus[self.device[wave.layer]]
        gpu.start(wave.id, wave.layer, orders.entries, orders.copies, adds=True)
        self.send_reads(wave.layer, read_records(orders.reads, self.device, DEMAND))
        return True

    def guess_at(self, sweep, layer):
        if layer == sweep.layer:
            return
        segment = self.segments[self.node[layer]]
        expected = self.rng.random(self.topology.n_experts) < 0.5
        guess = sweep.guess(layer, expected, segment.guess_room(layer, self.residency))
        reads, copies = order_guess(segment, self.residency, guess)
        for place in guess.placed:
            self.planner.arrays.unproven[layer, place.key.expert] = Tier.NVME
        self.send_reads(layer, read_records(reads, self.device, PREFETCH))
        self.gpus[self.device[layer]].order(copies)

    def fill(self):
        """Place and bring experts until both tiers are full, through what staging there is."""
        keys = (ExpertKey(i, e) for e in range(self.topology.n_experts)
                for i in range(self.topology.n_layers))  # fmt: skip
        rest = self.residency.fill(keys)
        while rest:
            left = []
            for node, segment in enumerate(self.segments):
                mine = [p for p in rest if self.node[p.key.layer] == node]
                reads, copies, waiting = segment.bring(mine, self.residency, ahead=True)
                left += waiting
                self.storages[node].ask(read_records(reads, self.device, 2))
                for device, gpu in enumerate(self.gpus):
                    of_device = [self.device[copy["layer"]] == device for copy in copies]
                    gpu.order(copies[np.array(of_device, bool)])
            assert len(left) < len(rest) or self.tick()
            rest = left
            self.hear()
        while self.tick():
            pass
        self.hear()
        for segment in self.segments:
            segment.all_landed()

    def guess(self, layer):
        self.send_ahead(layer, self.planner.look_ahead(layer, self.scores(layer, 1)))

    def send_ahead(self, layer, n_reads):
        copies = self.planner.ahead_copies.copy()
        self.send_reads(layer, self.planner.arrays.reads[:n_reads].copy())
        self.gpus[self.device[layer]].order(copies)

    def finish(self, device):
        """Wait for the device's wave, if there is one; returns it."""
        wave = self.open.get(device)
        if wave is None:
            return None
        while (done := self.gpus[device].done()) is None:
            self.go_on()
        assert done[:2] == (wave.id, wave.aborted)
        wave.all_computed += done[2]
        del self.open[device]
        self.planner.answered(device, aborted=wave.aborted)
        self.residency.release(wave.layer)
        if wave.is_last and not wave.aborted:
            assert sorted(wave.all_computed) == wave.wanted
        return wave

    def come_to_rest(self):
        """Let everything end that has begun, and check that nothing is lost."""
        for device in list(self.open):
            self.finish(device)
        while self.tick() or self.reports:
            self.hear()
        self.hear()
        assert not any(gpu.copies for gpu in self.gpus), "a copy waits for what nobody brings"
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
