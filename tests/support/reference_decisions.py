"""A decider in Python: the reference rules over the reference caches, one row at a time."""

import numpy as np

from fomoe.residency.reference import ReferenceLogical
from fomoe.routing import ExactRouting, PriceRouting, reference


class ReferenceDecider:
    def __init__(self, rule, shape, rules, k):
        n_sequences, n_layers, self.n_experts = shape
        self.rule, self.k = rule, k
        self.cells = [
            [ReferenceLogical(i, rules) for i in range(n_layers)] for _ in range(n_sequences)
        ]

    def hash(self, sequence):
        return sum(cell.hash for cell in self.cells[sequence]) % 2**64

    def mask(self, sequence, layer):
        mask = np.zeros(self.n_experts, bool)
        mask[list(self.cells[sequence][layer].resident)] = True
        return mask

    def decide(self, layer, scores, sequences):
        """Decide full rows; a list of dicts, one for each."""
        p = reference.softmax(scores)
        orders = np.argsort(-scores, axis=1, kind="stable")
        return [
            self._event(layer, s, order.tolist(), row[order], range(self.n_experts))
            for s, order, row in zip(sequences, orders, p, strict=True)
        ]

    def decide_compact(self, layer, ids, p, sequences):
        return [
            self._event(layer, s, order.tolist(), row, order.tolist())
            for s, order, row in zip(sequences, ids, p, strict=True)
        ]

    def _event(self, layer, sequence, order, p, known):
        cell, k = self.cells[sequence][layer], self.k
        acts = cell.decoded >= cell.rules.warmup
        rule = self.rule if acts else ExactRouting()
        mask, wanted = self.mask(sequence, layer), order[:k]
        ids, weights, substituted = reference.choose_ranked(rule, order, p, k, mask, layer=layer)
        probability = dict(zip(order, p, strict=True))
        cell.weigh({e: float(probability[e]) for e in known})
        cell.want(wanted)
        read = cell.run(ids)
        background = cell.fill(wanted, ids)
        cell.decoded += 1
        cell.close(ids, rule.price if isinstance(rule, PriceRouting) else None)
        return {
            "ids": ids, "weights": weights, "substituted": substituted, "read": read,
            "wanted": wanted, "background": background + [-1] * (k - len(background)),
        }  # fmt: skip

    def commit(self, layer, sequence, ids, p=None):
        cell = self.cells[sequence][layer]
        for t, token in enumerate(ids.tolist()):
            if p is not None:
                cell.weigh(dict(enumerate(p[t].tolist())))
            cell.want(token)
            cell.run(token)
            cell.close(token)
