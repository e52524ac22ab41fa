"""Router scores of many shapes for hypothesis."""

import numpy as np
from hypothesis import strategies as st

SIZES = [1, 2, 3, 7, 15, 16, 17, 24, 33, 60, 128]


@st.composite
def rows_of_scores(draw, sizes=tuple(SIZES)):
    """Logits [T, E] of many scales, some rounded so that they tie, some -inf; k; a mask."""
    n_tokens, n_experts = draw(st.integers(1, 4)), draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([1e-40, 0.2, 1.0, 4.0, 100.0]))
    logits = rng.normal(0, spread, (n_tokens, n_experts)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)
    logits[rng.random(logits.shape) < draw(st.sampled_from([0.0, 0.3]))] = -np.inf
    logits[:, 0] = np.maximum(logits[:, 0], np.float32(-1e30))
    resident = rng.random(logits.shape) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    return logits, draw(st.integers(1, min(n_experts, 12))), resident
