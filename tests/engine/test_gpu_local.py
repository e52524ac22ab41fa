"""A whole model on one emulated GPU says what the CPU's engine says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference.qwen35moe_f64 import relative_l2
from support.emulated_gpu import install_standin
from support.local_model import LocalModel, finished, greedy, tokens_of

from fomoe.engine.gpu_local import GPUText, gpu_logits, resident_model
from fomoe.engine.local import local_logits
from fomoe.engine.requests import SamplingParams
from fomoe.errors import RequestError
from fomoe.model.gpu.host import GPUModel

VECTORS = Path(__file__).parents[1] / "vectors"
PATH = VECTORS / "f32_tied.gguf"
CTX = 40


@pytest.fixture(scope="module")
def model() -> Iterator[GPUModel]:
    install_standin()
    with resident_model(PATH, "hip:0", ctx_size=CTX, max_tokens=16, int8=False) as loaded:
        yield loaded


@pytest.fixture
def prompt() -> list[int]:
    return np.load(PATH.with_suffix(".npz"))["tokens"][:20].tolist()


def test_greedy_text_and_decisions_are_those_of_the_cpu(model: GPUModel, prompt: list[int]) -> None:
    local = LocalModel(PATH)
    events = local.run(greedy(prompt, 12))
    text = GPUText(model)
    assert list(text.generate(prompt, 12)) == tokens_of(events)
    assert f"{text.hash:016x}" == finished(events).receipt.decision_hash


def test_sampled_text_is_that_of_the_cpu(model: GPUModel, prompt: list[int]) -> None:
    """A draw on the edge between two tokens could differ; none of these seeds has one."""
    local = LocalModel(PATH)
    for seed in range(3):
        sampling = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=seed)
        events = local.run(greedy(prompt, 8, sampling=sampling))
        assert list(GPUText(model).generate(prompt, 8, sampling)) == tokens_of(events)


@pytest.mark.parametrize("decode", [False, True])
def test_logits_are_those_of_the_cpu(model: GPUModel, prompt: list[int], decode: bool) -> None:
    expected = local_logits(PATH, prompt, activations="f32")
    assert relative_l2(gpu_logits(model, prompt, decode=decode), expected).max() <= 1e-4


def test_a_stop_id_ends_the_text_and_is_no_part_of_it(model: GPUModel, prompt: list[int]) -> None:
    whole = list(GPUText(model).generate(prompt, 6))
    stop = frozenset({whole[3]})
    assert list(GPUText(model).generate(prompt, 6, stop_ids=stop)) == whole[: whole.index(whole[3])]


def test_the_context_ends_the_text(model: GPUModel, prompt: list[int]) -> None:
    text = GPUText(model)
    assert len(list(text.generate(prompt, 100))) == CTX - len(prompt) + 1
    with pytest.raises(RequestError, match="room for 0"):
        text.step(1)


def test_a_text_begins_with_a_token(model: GPUModel) -> None:
    with pytest.raises(RequestError, match="empty"):
        next(GPUText(model).generate([], 1))
