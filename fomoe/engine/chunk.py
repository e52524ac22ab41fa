"""How many tokens of a prompt go through a layer together, where the user does not say."""

from __future__ import annotations

from fomoe.model.spec import ModelSpec

# A longer chunk reads each expert less often and wants more work memory: up to an eighth of what
# experts get, on top of it.
CHUNK_SHARE = 8
LEAST_CHUNK = 128
MOST_CHUNK = 4096
_STEP = 32  # chunks are whole multiples
_F32 = 4


def auto_chunk(spec: ModelSpec, ctx_size: int, n_devices: int, budget_bytes: int) -> int:
    """Return the tokens of a chunk whose work buffers fit an eighth of the experts' budget.

    Depends on the model and the configuration only; never above `ctx_size`, and at least 128.
    """
    fitting = budget_bytes // CHUNK_SHARE // token_bytes(spec, n_devices)
    chunk = max(LEAST_CHUNK, fitting // _STEP * _STEP)
    return min(chunk, MOST_CHUNK, ctx_size)


def token_bytes(spec: ModelSpec, n_devices: int) -> int:
    """Return about how many bytes of work memory a token of a chunk takes, over all processes.

    Attention, DeltaNet and the shared expert go through in tiles, whose buffers do not grow.
    """
    arena = 2 * 2 * spec.hidden * _F32  # x and out, two buffers
    quantised = spec.hidden * 3 // 2  # int8 rows, scales and sums
    rows = 4 * spec.hidden * _F32  # the residual stream, inputs of two routers, the shared output
    embedding = spec.hidden  # a row as it lies in the file
    scores = 2 * spec.moe.n_experts * _F32
    pairs = spec.moe.top_k * 40  # ids, weights and where they stand when sorted by expert
    return n_devices * (arena + quantised) + rows + embedding + scores + pairs
