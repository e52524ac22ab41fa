"""What `WavePlanner` does on nodes of GPUs, in Python: `ReferenceWaves` with copies."""

import numpy as np
from support.reference_waves import ReferenceWaves

from fomoe.engine.ahead import LEVELS
from fomoe.engine.copies import COPY, CopyKind, Outcome
from fomoe.routing import predict_experts
from fomoe.types import ExpertKey, Tier


class ReferenceGpuWaves(ReferenceWaves):
    """`arm[n]` of n experts of a token in RAM are computed there."""

    def __init__(self, *args, arm):
        super().__init__(*args)
        self.arm, self.open = arm, {}
        self.in_vain = []
        self.copy_guesses, self.tally = {}, np.zeros((2, LEVELS, 2), np.int64)
        self.step_copies = self.ahead_copies = np.empty(0, COPY)

    def place(self, layer, route):
        experts = np.unique(route.ids)
        in_ram = experts[self.residency.tier_of(layer)[experts] == Tier.RAM]
        n = self.arm[len(in_ram)] if len(route.ids) == 1 else 0
        self.stay = in_ram[len(in_ram) - n :].tolist()
        guesses = self.copy_guesses.pop(layer, [])
        self.in_vain = [expert for expert, *_ in guesses if expert not in experts]
        for expert, level, depth in guesses:
            self.tally[depth, level] += 1, expert in experts
        super().place(layer, route)

    def wave(self):
        layer, segment = self.layer, self._segment(self.layer)
        room = min(max(self.residency.quota(layer), self.top_k), self.residency.capacity(layer))
        self.first = self.end
        end = min(self.first + room, len(self.experts))
        tiers = self.residency.tier_of(layer)
        self.end = self._fitting(end, tiers, segment.spare(layer, self.residency))
        if self.end - self.first < len(self.experts):  # a step in parts computes nothing in RAM
            self.stay = []
            self.end = self._fitting(end, tiers, segment.spare(layer, self.residency))
        experts = self.experts[self.first : self.end]
        self.in_ram = np.array([e for e in experts if e in self.stay and tiers[e] == Tier.RAM],
                               np.int32)  # fmt: skip
        moved = np.setdiff1d(experts, self.in_ram).astype(np.int32)
        plan = self.residency.plan(layer, moved, self.in_ram)
        for fetch in plan.fetches:
            if fetch.source == Tier.NVME:
                self.unproven[layer, fetch.expert] = Tier.DEVICE
                self.background[layer, fetch.expert] = False
        self.counts = self._by_tier(plan, experts)
        self._earn(plan, experts)
        self.is_ahead = False
        reads = self._fetch(plan)
        copies, orders = list(self.step_copies), list(self.step_copies)
        self.ahead_copies = np.empty(0, COPY)
        fetched = {fetch.expert for fetch in plan.fetches}
        for expert in experts.tolist():
            key = ExpertKey(layer, expert)
            self.unproven[layer, expert] = Tier.DEVICE
            again = segment.demand(key)
            reads += [] if again is None else [again]
            if expert in self.in_ram:
                orders.append(segment.compute(key))
            elif expert not in fetched and not segment.is_in_vram(key, self.residency):
                vram = self.residency.device_slot(key)
                copies.append(segment.load(key, vram, ahead=False))
                orders.append(copies[-1])
        self.step_copies = np.array([tuple(c) for c in copies], COPY)
        self.open[int(self.layout.layer_device[layer])] = np.array([tuple(c) for c in orders], COPY)
        self.reads = self._records(reads, self.demand)
        self.entries = [
            segment.entry(ExpertKey(layer, e), self.residency) for e in experts.tolist()
        ]

    def _fitting(self, end, tiers, spare):
        for at, expert in enumerate(self.experts[self.first : end].tolist(), self.first):
            stays = expert in self.stay and tiers[expert] == Tier.RAM
            spare -= {Tier.DEVICE: 0, Tier.RAM: 0 if stays else 1, Tier.NVME: 2}[tiers[expert]]
            if spare < 0:
                return at
        return end

    def look_ahead(self, layer, scores, depth):
        self.counts, self.is_ahead = np.zeros(15, np.int64), True
        self.step_copies = self.ahead_copies = np.empty(0, COPY)
        self.reads = self._records([], self.prefetch)
        if not np.isfinite(scores.max(axis=1)).all():
            return
        expected = predict_experts(scores, self.top_k)
        tiers, nbytes = self.residency.tier_of(layer), int(self.layout.expert_bytes[layer])
        sure, reads = [], 0
        for expert, margin in zip(expected.ids.tolist(), expected.margins.tolist(), strict=True):
            level = sum(margin >= 2.0**power for power in range(-8, -8 + LEVELS - 1))
            guess = expert, level, depth - 1
            if tiers[expert] == Tier.RAM:
                self.copy_guesses.setdefault(layer, []).append(guess)
                named, wanted = self.tally[depth - 1, level]
                sure += [expert] if 3 * wanted >= named else []
            elif tiers[expert] == Tier.NVME:
                self.guesses.setdefault(layer, []).append(guess)
                affordable = self.ahead.credit[0] >= 2 * nbytes * (reads + 1)
                if self.ahead.allowed[depth - 1, level] and affordable:
                    sure.append(expert)
                    reads += 1
        plan = self._prefetch(layer, np.array(sure, np.int32))
        self.reads = self._records(self._fetch(plan), self.prefetch)
        for fetch in plan.fetches:
            self.unproven[layer, fetch.expert] = fetch.source
            self.background[layer, fetch.expert] = False
            if fetch.source == Tier.NVME:
                self.ahead.charged[layer, fetch.expert] = True
                self.ahead.credit -= 2 * nbytes
        self.counts[6], self.counts[14] = len(plan.fetches), len(self.reads)

    def read_later(self, layer, experts):
        step_copies = self.step_copies
        self.is_ahead = True
        super().read_later(layer, experts)
        self.step_copies = step_copies

    def give_up_guesses(self):
        segment, cancels = self._segment(self.layer), []
        for expert in self.in_vain:
            key = ExpertKey(self.layer, expert)
            is_placed = self.residency.device_slot(key) >= 0
            is_left = segment.is_in_vram(key, self.residency) or not segment.stays_in_ram(
                key, self.residency
            )
            if is_placed and not self.background[self.layer, expert] and not is_left:
                cancels.append(segment.cancel(key))
        self.reads = self._records([], self.prefetch)
        self.counts = np.zeros(15, np.int64)
        self.step_copies, self.ahead_copies = np.empty(0, COPY), np.array(cancels, COPY)

    def answered(self, device, *, aborted):
        for record in self.open.pop(device, ()):
            done = record["kind"] == CopyKind.DEMOTE or not aborted
            self._end(record, ahead=False, done=done)

    def ended(self, copies):
        for record in copies:
            self._end(record, ahead=True, done=record["outcome"] == Outcome.DONE)

    def forget(self, key):
        self.residency.forget(key.layer, np.array([key.expert], np.int32))
        cancelled = self._segment(key.layer).drop(key)
        self.unproven[key.layer, key.expert] = Tier.DEVICE
        return cancelled

    def _end(self, record, *, ahead, done):
        segment = self._segment(int(record["layer"]))
        if segment.end(record, self.residency, ahead=ahead, done=done):
            self.unproven[record["layer"], record["expert"]] = Tier.DEVICE

    def _prefetch(self, layer, experts):
        room = min(len(experts), self._segment(layer).ahead_room(layer, self.residency))
        room = 0 if any(self.arm) else room
        return self.residency.prefetch(layer, experts, room, eager=True)

    def _fetch(self, plan):
        reads, copies = self._segment(plan.layer).follow(plan, self.residency, ahead=self.is_ahead)
        if self.is_ahead:
            self.ahead_copies = copies
        else:
            self.step_copies = copies
        self.counts[7] += len(reads) * self.layout.expert_bytes[plan.layer]
        is_load = copies["kind"] == CopyKind.LOAD
        self.counts[8] += copies["nbytes"][is_load].sum()
        self.counts[9] += copies["nbytes"][~is_load].sum()
        return reads
