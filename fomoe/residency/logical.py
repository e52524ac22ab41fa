"""The cache that decisions may read: a pure function of one sequence's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError

_MASK_64 = (1 << 64) - 1
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
        self._tokens = np.zeros(n_layers, dtype=np.int64)
        self._hash = 0

    @property
    def hash(self) -> int:
        """The decision hash: 64 bits over all (token, layer, expert) so far, in any order."""
        return self._hash

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
        tokens = self.observe(layer, ids)
        keys = self._keys[layer]
        # A repeated id keeps its greatest key, which is its last token's.
        np.maximum.at(keys, ids, tokens[:, None] * keys.size + ids)

    def observe(self, layer: int, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Feed the hash with the next T tokens of the layer and leave residency alone.

        Args:
            layer: index of the MoE layer.
            ids: int32 [T, k], distinct in a row, in any order.

        Returns:
            int64 [T], the tokens' numbers in the layer.
        """
        first = int(self._tokens[layer])
        tokens = np.arange(first, first + len(ids), dtype=np.int64)
        self._tokens[layer] += len(ids)
        packed = (tokens[:, None] << 32) | (layer << 16) | ids
        # A sum does not depend on order, so neither layer-major prefill nor chunks change it.
        self._hash = (self._hash + int(splitmix64(packed.view(np.uint64)).sum())) & _MASK_64
        return tokens

    def snapshot(self) -> LogicalSnapshot:
        """Return a copy of the state."""
        return LogicalSnapshot(self._keys.copy(), self._tokens.copy(), self._hash)

    def restore(self, snapshot: LogicalSnapshot) -> None:
        """Go back to a snapshot of this cache or of one of the same shape."""
        self._keys[:] = snapshot.keys
        self._tokens[:] = snapshot.tokens
        self._hash = snapshot.hash


def splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit words, one to one and alike on every platform.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
