"""The CPU as a device: experts are computed in place, in shared memory."""

from __future__ import annotations

import numpy as np

from fomoe.kernels.cpu import ops
from fomoe.kernels.device import F32, I32, U64, ExpertShape


class CpuDevice:
    """Runs the CPU kernels in this process on `threads` threads."""

    is_emulated = True

    def __init__(self, name: str, *, threads: int, int8: bool) -> None:
        self.name = name
        self._float_activations = not int8
        ops.set_threads(threads)
        self._pairs = np.empty((0, 0), np.float32)

    def experts(
        self, shape: ExpertShape, addresses: U64, x: F32, pair_start: I32, pair_token: I32,
        pairs: F32,
    ) -> None:  # fmt: skip
        """Write pairs [P, D]; see `Device.experts`."""
        ops.experts(
            addresses[0], addresses[1], addresses[2], shape.types, shape.hidden, shape.width,
            x, pair_start, pair_token, pairs, self._float_activations,
        )  # fmt: skip

    def experts_sum(
        self, shape: ExpertShape, addresses: U64, x: F32, pair_start: I32, pair_token: I32,
        pair_weight: F32, out: F32,
    ) -> None:  # fmt: skip
        """Add experts to out [T, D]; see `Device.experts_sum`."""
        if self._pairs.shape[0] < len(pair_token) or self._pairs.shape[1] != shape.hidden:
            self._pairs = np.empty((len(pair_token), shape.hidden), np.float32)
        pairs = self._pairs[: len(pair_token)]
        self.experts(shape, addresses, x, pair_start, pair_token, pairs)
        for first, end in zip(pair_start[:-1].tolist(), pair_start[1:].tolist(), strict=True):
            tokens, count = pair_token[first:end], end - first
            order = np.arange(2 * count, dtype=np.int32).reshape(2, count).T.copy()
            weights = np.ones((count, 2), np.float32)
            weights[:, 1] = pair_weight[first:end]
            rows = np.empty((count, shape.hidden), np.float32)
            ops.reduce_pairs(np.concatenate([out[tokens], pairs[first:end]]), order, weights, rows)
            out[tokens] = rows

    def reduce(self, pairs: F32, order: I32, weights: F32, out: F32) -> None:
        """Write out [T, D]; see `Device.reduce`."""
        ops.reduce_pairs(pairs, order, weights, out)
