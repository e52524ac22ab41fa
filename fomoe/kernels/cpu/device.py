"""The CPU as a device: experts are computed in place, in shared memory."""

from __future__ import annotations

from fomoe.kernels.cpu import ops
from fomoe.kernels.device import F32, I32, U64, ExpertShape, WeightedPairs


class CpuDevice:
    """Runs the CPU kernels in this process on `threads` threads."""

    is_emulated = True

    def __init__(self, name: str, *, threads: int, int8: bool) -> None:
        self.name = name
        self._float_activations = not int8
        ops.set_threads(threads)

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
        self, shape: ExpertShape, addresses: U64, x: F32, pairs: WeightedPairs, out: F32
    ) -> None:
        """Add to out [T, D]; see `Device.experts_sum`."""
        ops.experts_sum(
            addresses[0], addresses[1], addresses[2], shape.types, shape.hidden, shape.width,
            x, pairs.start, pairs.token, pairs.weight, out, self._float_activations,
        )  # fmt: skip

    def reduce(self, pairs: F32, order: I32, weights: F32, out: F32) -> None:
        """Write out [T, D]; see `Device.reduce`."""
        ops.reduce_pairs(pairs, order, weights, out)
