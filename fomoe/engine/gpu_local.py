"""A whole model on one GPU in one process: prompt to tokens without actors or tiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fomoe.engine.requests import SamplingParams
from fomoe.engine.sampler import refuse_broken, sample
from fomoe.errors import RequestError
from fomoe.gguf.reader import open_gguf
from fomoe.kernels.gpu.gpu import open_gpu
from fomoe.model.archs import read_spec
from fomoe.model.buffers import F32
from fomoe.model.gpu.host import GPUModel, planned_bytes, resident_bytes
from fomoe.model.gpu.options import HostOptions
from fomoe.model.layers import HEAD_ROWS
from fomoe.residency import LogicalCache, LogicalRules

I32 = np.int32
_SPARE_BYTES = 64 << 20
_PLAIN = SamplingParams(temperature=0.0)


@contextmanager
def resident_model(
    path: Path | str, device: str, *, ctx_size: int, max_tokens: int = 512, int8: bool = True,
    graphs: bool = True, kv_dtype: str = "f16",
) -> Iterator[GPUModel]:  # fmt: skip
    """Yield the model of a file with all its experts on a device such as `cuda:0` or `hip:0`.

    Raises:
        DeviceError: the device is missing, or too small for the model.
    """
    file = open_gguf(Path(path))
    spec = read_spec(file)
    options = HostOptions(
        layers=tuple(range(spec.n_layers)), ctx_size=ctx_size, max_tokens=max_tokens, int8=int8,
        graphs=graphs, kv_dtype=kv_dtype,
    )  # fmt: skip
    needed = planned_bytes(file, spec, options) + resident_bytes(file, spec, options)
    gpu = open_gpu(device, needed + _SPARE_BYTES)
    try:
        model = GPUModel(gpu, file, spec, options)
        model.add_all_slots()
        model.load_experts()
        yield model
    finally:
        gpu.close()


class GPUText:
    """One text under way on a device that holds every expert; prompts are always exact.

    Attributes:
        tokens: those that have gone through the layers.
        logical: learns of every decision, so that its hash is that of the CPU's engine.
    """

    def __init__(self, model: GPUModel, *, state: int = 0) -> None:
        self._model = model
        self._state = state
        spec = model.spec
        self.tokens: list[int] = []
        self._rules = LogicalRules(capacity=spec.moe.n_experts)
        self.logical = LogicalCache(spec.n_layers, spec.moe.n_experts, self._rules)
        model.reset(state)

    @property
    def hash(self) -> int:
        """The decision hash over all experts that ran."""
        return self.logical.hash

    def feed(self, tokens: list[int]) -> Iterator[int]:
        """Run a prompt chunk by chunk; yields each chunk's size, its rows' logits at hand.

        Raises:
            RequestError: the context does not hold them.
        """
        self._check_room(len(tokens))
        step = self._model.options.max_tokens
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            ids = self._model.prefill(np.array(part, I32), len(self.tokens), self._state)
            self._observe(ids)
            self.tokens += part
            yield len(part)

    def step(self, token: int) -> int:
        """Run one token; returns the most probable next one (ties: the lower id)."""
        self._check_room(1)
        self._model.decode(token, len(self.tokens), self._state)
        decoded = self._model.decoded()
        self._observe(decoded.ids[:, None])
        self.tokens.append(token)
        refuse_broken(decoded.logit, len(self.tokens))
        return decoded.token

    def generate(
        self, prompt: list[int], max_tokens: int, sampling: SamplingParams = _PLAIN,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Iterator[int]:  # fmt: skip
        """Yield up to `max_tokens` tokens after a prompt, none of `stop_ids`.

        The draw of a position depends on (seed, position) and the logits alone, as everywhere.

        Raises:
            RequestError: the prompt is empty, or the context does not hold it.
            EngineError: logits are not finite.
        """
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        rows = 0
        for size in self.feed(prompt):
            rows = size
        seen, drawn = Counter(prompt), Counter[int]()
        logits = self._model.logits([rows - 1])[0]
        token = sample(logits, sampling, len(self.tokens), seen, drawn)
        for left in reversed(range(max_tokens)):
            if token in stop_ids:
                return
            yield token
            if left == 0 or len(self.tokens) == self._model.options.ctx_size:
                return
            drawn[token] += 1
            token = self.step(token)
            if sampling != _PLAIN:
                row = self._model.logits([0])[0]
                token = sample(row, sampling, len(self.tokens), seen, drawn)

    def _observe(self, ids: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
        for layer, chosen in enumerate(ids):
            self.logical.observe(layer, chosen)

    def _check_room(self, count: int) -> None:
        room = self._model.options.ctx_size - len(self.tokens)
        if count > room:
            raise RequestError(f"{count} tokens more: the context has room for {room}", "prompt")


def gpu_logits(model: GPUModel, tokens: list[int], *, decode: bool = False) -> F32:
    """Return the logits float32 [T, V] of a token sequence, as `local_logits` does.

    In chunks as a prompt, or token by token (`decode`).
    """
    text = GPUText(model)
    out = np.empty((len(tokens), model.spec.vocab), np.float32)
    if decode:
        for at, token in enumerate(tokens):
            text.step(token)
            out[at] = model.logits([0])[0]
        return out
    at = 0
    for size in text.feed(tokens):
        for row in range(0, size, HEAD_ROWS):
            rows = list(range(row, min(row + HEAD_ROWS, size)))
            out[at + row : at + row + len(rows)] = model.logits(rows)
        at += size
    return out
