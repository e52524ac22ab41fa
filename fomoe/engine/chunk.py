"""How many tokens of a prompt go through a layer together, where the user does not say."""

from __future__ import annotations

from fomoe.model.spec import ModelSpec

# A longer chunk reads each expert less often and wants more work memory: an eighth of what experts
# get. What is read while attention computes bounds the gain, so a small share is enough.
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
    """Return about how many bytes of work memory a token of a chunk takes, over all processes."""
    moe, attention, delta = spec.moe, spec.attention, spec.delta
    arena = 2 * 2 * spec.hidden * _F32  # x and out, two buffers
    residual = 7 * spec.hidden * _F32  # the stream, and inputs and outputs of both blocks
    shared = 3 * moe.shared_width * _F32
    router = moe.n_experts * (2 * _F32 + 3 * 8)  # scores of two layers, sort keys and copies
    queries = 5 * attention.n_heads * attention.head_dim * _F32  # with their gates, twice
    state = (2 * delta.channels + 3 * delta.inner) * _F32
    return n_devices * arena + residual + shared + router + queries + state
