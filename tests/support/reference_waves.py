"""The steps of `WavePlanner` in Python: one object per decision, as they were first written."""

import numpy as np

from fomoe.engine.ahead import LEVELS
from fomoe.engine.transfers import READ, Read
from fomoe.routing import Route, group_by_expert, predict_experts, route_exact
from fomoe.types import ExpertKey, Tier


class ReferenceWaves:
    """Works on a residency and segments of its own; `priorities` are those of `Priorities`."""

    in_ram = ()  # of the wave, those that are computed there

    def __init__(self, residency, segments, layout, priorities, ahead, max_tokens, top_k):
        self.ahead, self.guesses = ahead, {}
        self.residency, self.segments, self.layout = residency, segments, layout
        self.demand, self.prefetch, self.background_priority = priorities
        self.top_k = top_k
        n_experts = residency.mask(0).size
        pairs = max_tokens * top_k
        self.order = np.zeros((max_tokens, top_k), np.int32)
        self.weights = np.zeros((max_tokens, top_k), np.float32)
        self.pair_token = np.zeros(pairs, np.int32)
        self.pair_start = np.zeros(min(pairs, n_experts) + 1, np.int32)
        self.unproven = np.full((len(layout.layer_node), n_experts), Tier.DEVICE, np.int8)
        self.background = np.zeros(self.unproven.shape, bool)

    def decide(self, layer, scores, logical):
        route = route_exact(scores, self.top_k)
        logical.observe(layer, route.ids)
        self.place(layer, route)

    def decide_by(self, layer, scores, decider):
        made = decider.decide(layer, scores)
        self.place(layer, Route(made.ids, made.weights, made.substituted))
        first, later = self.reads, made.background[0][made.background[0] >= 0]
        if later.size:
            counts = self.counts
            self.read_later(layer, later)
            counts[7:] += self.counts[7:]
            self.counts, self.reads = counts, np.concatenate([first, self.reads])

    def read_later(self, layer, experts):
        self.counts = np.zeros(15, np.int64)
        plan = self._prefetch(layer, experts)
        reads = self._fetch(plan)
        self.reads = self._records(reads, self.background_priority)
        nbytes = int(self.layout.expert_bytes[layer])
        for fetch in plan.fetches:
            self.unproven[layer, fetch.expert] = fetch.source
            self.background[layer, fetch.expert] = True
            history = self.residency._history
            history.touch(layer, fetch.expert, int(history.steps[layer]))
            if fetch.source == Tier.NVME:
                self.ahead.charged[layer, fetch.expert] = False
                self.ahead.misses += 1
                self.ahead.credit += nbytes * self.ahead.budget_permille // 1000
        self.counts[11:13] = len(reads), len(reads) * nbytes

    def place(self, layer, route):
        groups = group_by_expert(route.ids)
        tiers = self.residency.tier_of(layer)[groups.experts]
        by_tier = np.argsort(tiers, kind="stable")
        counts = np.diff(groups.pair_start)[by_tier]
        n, pairs, tokens = len(by_tier), len(groups.pair_token), len(route.ids)
        self.pair_start[0] = 0
        np.cumsum(counts, out=self.pair_start[1 : n + 1])
        moved = np.empty(n, np.int32)
        moved[by_tier] = self.pair_start[:n] - groups.pair_start[by_tier]
        new_of_old = np.arange(pairs, dtype=np.int32) + np.repeat(moved, np.diff(groups.pair_start))
        self.pair_token[new_of_old] = groups.pair_token
        self.order[:tokens] = new_of_old[groups.order]
        self.weights[:tokens] = groups.arrange(route.weights)
        replaced = np.bincount(route.ids[route.substituted], minlength=int(groups.experts[-1]) + 1)[
            groups.experts
        ]
        for expert, level, depth in self.guesses.pop(layer, []):
            self.ahead.named[depth, level] += 1
            self.ahead.wanted[depth, level] += expert in groups.experts
        self.layer, self.route = layer, route
        self.experts = groups.experts[by_tier]
        self.pairs = counts - replaced[by_tier]
        self.replaced = replaced[by_tier]
        self.first = self.end = 0
        self.wave()

    def wave(self):
        layer = self.layer
        room = min(max(self.residency.quota(layer), self.top_k), self.residency.capacity(layer))
        self.first = self.end
        self.end = min(self.first + room, len(self.experts))
        experts = self.experts[self.first : self.end]
        plan = self.residency.plan(layer, np.sort(experts))
        for fetch in plan.fetches:
            if fetch.source == Tier.NVME:
                self.unproven[layer, fetch.expert] = Tier.DEVICE
                self.background[layer, fetch.expert] = False
        self.counts = self._by_tier(plan, experts)
        self._earn(plan, experts)
        reads = self._fetch(plan)
        reads += self._prove(experts)
        self.reads = self._records(reads, self.demand)
        slots, addresses, generations = self._segment(layer).locate(layer, experts)
        rows = zip(addresses, generations, slots, experts, strict=True)
        self.entries = [tuple(int(x) for x in row) for row in rows]

    def look_ahead(self, layer, scores, depth):
        self.counts = np.zeros(15, np.int64)
        if not np.isfinite(scores.max(axis=1)).all():
            self.reads = self._records([], self.prefetch)
            return
        expected = predict_experts(scores, self.top_k)
        tiers, nbytes = self.residency.tier_of(layer), int(self.layout.expert_bytes[layer])
        sure = []
        for expert, margin in zip(expected.ids.tolist(), expected.margins.tolist(), strict=True):
            if tiers[expert] != Tier.NVME:
                continue
            level = sum(margin >= 2.0**power for power in range(-8, -8 + LEVELS - 1))
            self.guesses.setdefault(layer, []).append((expert, level, depth - 1))
            affordable = self.ahead.credit[0] >= 2 * nbytes * (len(sure) + 1)
            if self.ahead.allowed[depth - 1, level] and affordable:
                sure.append(expert)
        plan = self._prefetch(layer, np.array(sure, np.int32))
        self.reads = self._records(self._fetch(plan), self.prefetch)
        for fetch in plan.fetches:
            self.unproven[layer, fetch.expert] = fetch.source
            self.background[layer, fetch.expert] = False
            self.ahead.charged[layer, fetch.expert] = True
            self.ahead.credit -= 2 * nbytes
        self.counts[6], self.counts[14] = len(plan.fetches), len(self.reads)

    def forget(self, key):
        self.residency.forget(key.layer, np.array([key.expert], np.int32))
        self._segment(key.layer).forget(key)
        self.unproven[key.layer, key.expert] = Tier.DEVICE

    def _prefetch(self, layer, experts):
        return self.residency.prefetch(layer, experts, len(experts), eager=True)

    def _segment(self, layer):
        return self.segments[self.layout.layer_node[layer]]

    def _by_tier(self, plan, experts):
        source = np.where(self.background[self.layer], Tier.DEVICE, self.unproven[self.layer])
        counts = np.zeros(15, np.int64)
        for fetch in plan.fetches:
            if source[fetch.expert] != Tier.NVME:
                source[fetch.expert] = fetch.source
        counts[13] = len(self.in_ram)
        for expert in self.in_ram:
            if source[expert] != Tier.NVME:
                source[expert] = Tier.RAM
        for at, of in ((0, self.pairs), (3, self.replaced)):
            tiers = np.bincount(source[experts], weights=of[self.first : self.end], minlength=3)
            counts[at : at + 3] = tiers
        return counts

    def _earn(self, plan, experts):
        """What was to be read, by a guess or now, adds to what guesses may waste."""
        layer, nbytes = self.layer, int(self.layout.expert_bytes[self.layer])
        share = nbytes * self.ahead.budget_permille // 1000
        read = {fetch.expert for fetch in plan.fetches if fetch.source == Tier.NVME}
        for expert in experts.tolist():
            paid = bool(self.ahead.charged[layer, expert])
            if expert in read:
                self.ahead.charged[layer, expert] = False
            if expert in read:
                self.ahead.misses += 1
                self.ahead.credit += share
            elif self.unproven[layer, expert] != Tier.DEVICE and not self.background[layer, expert]:
                self.ahead.charged[layer, expert] = False
                if paid:
                    self.ahead.misses += 1
                    self.ahead.credit += share + 2 * nbytes
                    self.counts[10] += 1

    def _fetch(self, plan):
        reads = self._segment(plan.layer).apply(
            plan, lambda key: bool(self.residency.mask(key.layer)[key.expert])
        )
        nbytes = self.layout.expert_bytes
        self.counts[7] = len(reads) * nbytes[plan.layer]
        self.counts[8] = sum(nbytes[plan.layer] for f in plan.fetches if f.source == Tier.RAM)
        self.counts[9] = sum(nbytes[f.victim.layer] for f in plan.fetches if f.demoted_to >= 0)
        return reads

    def _prove(self, experts):
        layer = self.layer
        unproven = experts[self.unproven[layer, experts] != Tier.DEVICE]
        self.unproven[layer, unproven] = Tier.DEVICE
        columns = self._segment(layer).locate(layer, unproven)
        return [
            Read(ExpertKey(layer, e), s, a, g)
            for e, s, a, g in zip(unproven.tolist(), *(c.tolist() for c in columns), strict=True)
        ]

    def _records(self, reads, priority):
        rows = [
            (r.address, r.generation, r.slot, r.expert.layer, r.expert.expert, priority,
             self.layout.layer_device[r.expert.layer], 0)
            for r in reads
        ]  # fmt: skip
        return np.array(rows, READ)
