"""A model of random blocks that was never written: what a GGUF file answers, out of a recipe."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from synthetic.blocks import Repeated
from synthetic.model_file import Pending, Recipe, tensors
from synthetic.shapes import ModelShape

from fomoe.gguf.header import TensorInfo
from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.model.spec import AttentionSpec, DeltaSpec, ModelSpec, MoESpec

U8 = npt.NDArray[np.uint8]


class MemoryFile:
    """The tensors of `synthetic.model_file.write_model` by name, made when they are read.

    Expert tensors are to be taken by `blocks`, as their pool and where they begin in it: whole,
    a layer of the 397B's is gigabytes.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.path = Path(f"{recipe.shape.name}-{recipe.layers}l")
        self._pending: dict[str, Pending] = {}
        infos, offset = {}, 0
        for each in tensors(recipe):
            kind = GGMLType[each.kind]
            infos[each.name] = TensorInfo(each.name, kind, each.shape, 0, offset, each.nbytes)
            self._pending[each.name] = each
            offset += each.nbytes
        self.tensors = MappingProxyType(infos)
        self.shard_bytes = (offset,)
        self.shards = (self.path,)

    def tensor(self, name: str) -> TensorInfo:
        """The entry of a tensor."""
        return self.tensors[name]

    def read(self, name: str) -> U8:
        """The blocks of a tensor, uint8 [rows, row_bytes]."""
        info, made = self.tensors[name], self._pending[name].make()
        width = row_bytes(info.type, info.shape[-1])
        if isinstance(made, Repeated):
            pool, start, nbytes = made.parts
            turns = -(-(start + nbytes) // len(pool))
            data = np.concatenate([pool] * turns)[start : start + nbytes] if turns > 1 else (
                pool[start : start + nbytes]
            )
        else:
            data = np.ascontiguousarray(made).reshape(-1).view(np.uint8)
        return data.reshape(-1, width)

    def read_f32(self, name: str) -> npt.NDArray[np.float32]:
        """A float32 tensor in its shape."""
        return self.read(name).reshape(-1).view(np.float32).reshape(self.tensors[name].shape)

    def blocks(self, name: str) -> tuple[U8, int]:
        """The pool of a tensor's blocks, uint8 [n], and the byte of it that the tensor begins at."""
        pool, start, _ = self._pending[name].make().parts
        return pool, start


def spec_of(shape: ModelShape, layers: int) -> ModelSpec:
    """What `read_spec` says of a file of this recipe."""
    return ModelSpec(
        architecture="qwen35moe",
        name=f"synthetic {shape.name}, {layers} layers",
        hidden=shape.hidden,
        vocab=shape.vocab,
        ctx_train=262_144,
        eps=1e-6,
        layers=tuple("attention" if shape.is_attention(i) else "delta" for i in range(layers)),
        attention=AttentionSpec(
            n_heads=shape.heads, n_kv_heads=shape.kv_heads, head_dim=shape.head_dim,
            rope_dims=shape.rotary, rope_base=10_000_000.0,
        ),
        delta=DeltaSpec(
            n_k_heads=shape.key_heads, n_v_heads=shape.value_heads, key_dim=shape.state_dim,
            value_dim=shape.state_dim, conv_width=shape.conv_width,
        ),
        moe=MoESpec(
            n_experts=shape.experts, top_k=shape.top_k, expert_width=shape.width,
            shared_width=shape.width,
        ),
    )  # fmt: skip
