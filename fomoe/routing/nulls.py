"""The count-matched null: as many harmless perturbations as a policy made substitutions.

A forward pass is chaotic in a small way: rounding one expert's weight moves the logits a little,
and KL counts it. What a policy costs is what it adds to a run that was touched at as many sites
without any intent. Here a site is a (token, layer, rank), and touching it rounds its routing weight
to bfloat16. A random swap of experts would be no null: it is a policy, and a bad one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def round_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return finite float32 values rounded to bfloat16, half to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def touched_sites(
    logits: npt.NDArray[np.float32], k: int, share: float, *, seed: int = 0
) -> npt.NDArray[np.bool_]:
    """Return bool [T, k]: a share of the sites of T tokens in one layer, by a hash.

    Which sites is a function of the bits of a token's router scores, the rank and the seed, so the
    null is as reproducible as a rule. With a policy's share of substitutions there are as many
    sites as the policy had in the mean; over n sites their number varies by sqrt(n).

    Args:
        logits: float32 [T, E], router scores.
        k: experts per token.
        share: 0 to 1.
        seed: another one touches other sites.
    """
    mask: npt.NDArray[np.bool_] = _uniform(logits, k, seed) < share
    return mask


def _uniform(logits: npt.NDArray[np.float32], k: int, seed: int) -> npt.NDArray[np.float64]:
    """Return float64 [T, k] in [0, 1) from the bits of each row (splitmix64's finaliser)."""
    bits = np.ascontiguousarray(logits, np.float32).view(np.uint32).astype(np.uint64)
    odd = np.arange(bits.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    row = (bits * odd * np.uint64(0x9E3779B97F4A7C15)).sum(axis=1, dtype=np.uint64)
    start = np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    x = row[:, None] + start + np.arange(1, k + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    uniform: npt.NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform
