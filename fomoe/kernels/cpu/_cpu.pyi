import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
U64 = npt.NDArray[np.uint64]
Cache = npt.NDArray[np.float16] | npt.NDArray[np.float32]

def set_threads(count: int) -> None: ...
def isa() -> str: ...
def isa_report() -> str: ...
def use_isa(name: str) -> None: ...
def stream_read(data: U8) -> int: ...
def call_seconds(n: int) -> float: ...
def dequantize(qtype: int, weights: U8, out: F32) -> None: ...
def embed(qtype: int, weights: U8, ids: I32, out: F32) -> None: ...
def quantize_activations(x: F32, q: I8, scale: F32) -> None: ...
def matmul_q8(qtype: int, weights: U8, q: I8, scale: F32, out: F32) -> None: ...
def matmul_f32(qtype: int, weights: U8, x: F32, out: F32) -> None: ...
def experts(
    gate: U64,
    up: U64,
    down: U64,
    qtypes: tuple[int, int, int],
    hidden: int,
    width: int,
    x: F32,
    pair_start: I32,
    pair_token: I32,
    out: F32,
    exact_activations: bool,
) -> None: ...
def experts_sum(
    gate: U64,
    up: U64,
    down: U64,
    qtypes: tuple[int, int, int],
    hidden: int,
    width: int,
    x: F32,
    pair_start: I32,
    pair_token: I32,
    weights: F32,
    out: F32,
    exact_activations: bool,
) -> None: ...
def reduce_pairs(pairs: F32, order: I32, weights: F32, out: F32) -> None: ...
def rms_norm(x: F32, weight: F32, eps: float, out: F32) -> None: ...
def gated_rms_norm(x: F32, z: F32, weight: F32, eps: float, out: F32) -> None: ...
def head_rms_norm(x: F32, weight: F32, eps: float) -> None: ...
def rope(x: F32, positions: I32, n_rot: int, base: float) -> None: ...
def kv_store(k: F32, v: F32, cache_k: Cache, cache_v: Cache, position0: int) -> None: ...
def attention(q: F32, cache_k: Cache, cache_v: Cache, position0: int, out: F32) -> None: ...
def sigmoid_gate(x: F32, gate: F32) -> None: ...
def conv_silu(x: F32, weight: F32, state: F32, out: F32) -> None: ...
def deltanet(
    qkv: F32,
    alpha: F32,
    beta: F32,
    ssm_a: F32,
    dt_bias: F32,
    n_k_heads: int,
    n_v_heads: int,
    dk: int,
    dv: int,
    eps: float,
    state: F32,
    out: F32,
) -> None: ...
def silu_mul(gate: F32, up: F32, out: F32) -> None: ...
def add(a: F32, b: F32) -> None: ...
def add3(routed: F32, shared: F32, residual: F32) -> None: ...
def scale_sigmoid(x: F32, gate: F32) -> None: ...

class DeltaMixer:
    """x += W_o gated_norm(delta(conv(W_qkv norm(x))), z)."""

    def __init__(
        self,
        heads: tuple[int, int, int, int],
        eps: float,
        int8: bool,
        weights: dict[str, object],
    ) -> None:
        """`heads`: key heads, value heads, key dim, value dim.

        Weights: norm, qkv, z, alpha, beta, conv, decay, dt_bias, out_norm, output.
        """

    def run(self, x: F32, conv_state: F32, memory: F32) -> None:
        """Update `x` [T, D] in place; the states move on by T tokens."""

class AttentionMixer:
    """x += W_o (attention(norm(x)) * sigmoid(gate))."""

    def __init__(
        self,
        heads: tuple[int, int, int],
        rope_dims: int,
        rope_base: float,
        eps: float,
        int8: bool,
        weights: dict[str, object],
    ) -> None:
        """`heads`: query heads, key/value heads, head dim.

        Weights: norm, q, k, v, q_norm, k_norm, output.
        """

    def run(self, x: F32, cache_k: Cache, cache_v: Cache, position0: int) -> None:
        """Update `x` [T, D] in place; the caches take the positions from `position0` on."""

class MoeDense:
    """Router and shared expert of one layer.

    Weights: norm, router, gate, up, down, scale.
    """

    def __init__(self, eps: float, int8: bool, weights: dict[str, object]) -> None: ...
    def route(self, x: F32, h: F32, scores: F32) -> None:
        """Write the normed residual into `h` [T, D] and router scores into `scores` [T, E]."""

    def shared(self, h: F32, out: F32) -> None:
        """Write the shared expert's output times its sigmoid gate into `out` [T, D]."""
