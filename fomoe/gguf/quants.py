"""Block-quantised storage types of GGUF tensors: their ids, block sizes and row sizes."""

from __future__ import annotations

from enum import IntEnum


class GGMLType(IntEnum):
    """A tensor type that the kernels can read; the value is its id in the file.

    Ids, block lengths and block sizes: `ggml_type` in ggml.h and the block structs in
    ggml-common.h.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30

    @property
    def block_elements(self) -> int:
        """Number of weights in one block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Size of one block in bytes."""
        return _BLOCKS[self][1]

    @property
    def is_float(self) -> bool:
        """Whether the type stores plain floating-point numbers, one per block."""
        return self in (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


# type -> (weights per block, bytes per block); the sums are the fields of each block struct
_BLOCKS: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 2 + 16),
    GGMLType.Q4_1: (32, 2 + 2 + 16),
    GGMLType.Q5_0: (32, 2 + 4 + 16),
    GGMLType.Q5_1: (32, 2 + 2 + 4 + 16),
    GGMLType.Q8_0: (32, 2 + 32),
    GGMLType.Q2_K: (256, 16 + 64 + 2 + 2),
    GGMLType.Q3_K: (256, 32 + 64 + 12 + 2),
    GGMLType.Q4_K: (256, 2 + 2 + 12 + 128),
    GGMLType.Q5_K: (256, 2 + 2 + 12 + 32 + 128),
    GGMLType.Q6_K: (256, 128 + 64 + 16 + 2),
    GGMLType.IQ4_NL: (32, 2 + 16),
    GGMLType.IQ4_XS: (256, 2 + 2 + 4 + 128),
}

# Types that other programs write and these kernels do not read, named for the error message.
UNSUPPORTED_TYPES: dict[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


def row_bytes(qtype: GGMLType, n: int) -> int:
    """Size in bytes of a row of `n` weights.

    Raises:
        ValueError: `n` is negative or not a multiple of the type's block length.
    """
    if n < 0 or n % qtype.block_elements:
        raise ValueError(
            f"a row of {n} weights does not divide into {qtype.name} blocks of "
            f"{qtype.block_elements}"
        )
    return n // qtype.block_elements * qtype.block_bytes
