"""The cache that decisions may read: a pure function of one sequence's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.residency import _residency

_NEVER = -1


@dataclass(frozen=True, slots=True, eq=False)
class LogicalSnapshot:
    """A logical cache's state at one moment; owns its arrays."""

    keys: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    hash: int


class LogicalCache:
    """LRU residency of one sequence, per layer, in token time.

    A token's experts are one event; after each event the `capacity` most recently touched experts
    of the layer are resident, the higher id first among those of one token. That set depends on
    each expert's last token alone, so how tokens are split into chunks cannot matter.
    """

    def __init__(self, n_layers: int, n_experts: int, capacity: int) -> None:
        """Start with nothing resident.

        Raises:
            ConfigError: `capacity` is not in 1..n_experts, or a size has more than 16 bits.
        """
        if not 1 <= capacity <= n_experts:
            raise ConfigError(
                f"logical capacity {capacity} of {n_experts} experts: choose 1 to {n_experts}"
            )
        if max(n_layers, n_experts) > 1 << 16:
            raise ConfigError(f"{n_layers} layers of {n_experts} experts: at most 65,536 of each")
        self.capacity = capacity
        self._keys = np.full((n_layers, n_experts), _NEVER, dtype=np.int64)
        self.tokens = np.zeros(n_layers, dtype=np.int64)
        self.hash_word = np.zeros(1, dtype=np.uint64)

    @property
    def hash(self) -> int:
        """The decision hash: 64 bits over all (token, layer, expert) so far, in any order."""
        return int(self.hash_word[0])

    def mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return bool [E]: the resident experts of the layer."""
        keys = self._keys[layer]
        kth = keys.size - self.capacity
        least = np.partition(keys, kth)[kth]
        mask: npt.NDArray[np.bool_] = keys >= max(int(least), 0)
        return mask

    def commit(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """Make the experts of the next T tokens of the layer resident, token by token.

        Args:
            layer: index of the MoE layer.
            ids: int32 [T, k], distinct in a row, k <= capacity.

        Raises:
            ConfigError: a token has more experts than the layer may hold.
        """
        if ids.shape[1] > self.capacity:
            raise ConfigError(
                f"logical capacity {self.capacity}: at least {ids.shape[1]}, the experts of one "
                f"token, are needed"
            )
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        first = _residency.observe(layer, ids, self.tokens, self.hash_word)
        # A repeated id keeps its greatest key, which is its last token's.
        _residency.commit(first, ids, self._keys, layer)

    def observe(self, layer: int, ids: npt.NDArray[np.int32]) -> int:
        """Feed the hash with the next T tokens of the layer and leave residency alone.

        Args:
            layer: index of the MoE layer.
            ids: int32 [T, k], distinct in a row, in any order.

        Returns:
            The number of the first of them in the layer.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        return _residency.observe(layer, ids, self.tokens, self.hash_word)

    def snapshot(self) -> LogicalSnapshot:
        """Return a copy of the state."""
        return LogicalSnapshot(self._keys.copy(), self.tokens.copy(), self.hash)

    def restore(self, snapshot: LogicalSnapshot) -> None:
        """Go back to a snapshot of this cache or of one of the same shape."""
        self._keys[:] = snapshot.keys
        self.tokens[:] = snapshot.tokens
        self.hash_word[0] = snapshot.hash
