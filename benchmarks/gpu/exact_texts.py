"""Greedy text of the bundled model on a device, against the CPU's path token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpu_path import F32, Choice, CPUPath

from fomoe.engine.gpu_local import GPUText, gpu_logits, resident_model
from fomoe.gguf.reader import open_gguf
from fomoe.model.gpu.host import GPUModel
from fomoe.model.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "models" / "fomoe-demo-Q4_K_M.gguf"
CTX = 320
NOISE = 3e-7  # about what the order of float32 sums makes of a layer's output
PROMPTS = (
    "The lighthouse keeper opened the door and",
    "In the year 1912 the town council decided that",
    "A short history of bread:",
    "Water boils when",
    "The river rises in the mountains and flows through",
    "Her first album was recorded in",
    "<|im_start|>user\nWhat is a volcano?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nTell me about your favourite season.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nCount from one to ten.<|im_end|>\n<|im_start|>assistant\n",
    "The species is found in",
    "During the war, the battalion",
    "She was born in London, the daughter of",
    "1, 2, 3, 4, 5,",
    "To make a cup of tea, first",
    "The station was opened on",
    "Once upon a time there was a fox who",
    "According to the census,",
    "The theorem states that",
    "The match ended",
    "It is known for its beaches, its old harbour and " * 4,
)


@dataclass(frozen=True)
class Part:
    """Where a text of the device leaves the CPU's, -1 for nowhere, and where its decisions do.

    `margin` is the CPU's at the first other token: how far its logit is above the second.
    """

    prompt: int
    token: int
    margin: float
    decision: int


def compare_texts(device: str, count: int, prompts: int, *, int8: bool) -> dict[str, Any]:
    """Return how many of the texts of `count` tokens are equal, and where the others part.

    The device reads the CPU's texts, too: at how many tokens would it go on otherwise, after the
    same beginning? The control is the CPU's path with the noise of float32 sums: int8 activations
    make so much of it that no two orders of summation write the same texts.
    """
    tokenizer = Tokenizer.from_gguf(open_gguf(MODEL).metadata)
    cpu = CPUPath(MODEL, ctx_size=CTX, int8=int8)
    control = CPUPath(MODEL, ctx_size=CTX, int8=int8, noise=NOISE)
    parts: list[Part] = []
    control_equal = control_misread = 0
    margins: list[float] = []
    with resident_model(MODEL, device, ctx_size=CTX, max_tokens=128, int8=int8) as model:
        for number, prompt in enumerate(PROMPTS[:prompts]):
            ids = tokenizer.encode_special(prompt)
            expected = cpu.generate(ids, count)
            parts.append(_part(number, expected, _generate(model, ids, count)))
            read = ids + [choice.token for choice in expected[:-1]]
            margins += _misread(gpu_logits(model, read), expected)
            tokens = [choice.token for choice in control.generate(ids, count)]
            control_equal += tokens == [choice.token for choice in expected]
            control_misread += len(_misread(control.logits(read), expected))
    return {
        "activations": "int8" if int8 else "float32",
        "texts": prompts,
        "tokens": count,
        "equal texts": sum(part.token < 0 for part in parts),
        "equal decisions": sum(part.decision < 0 for part in parts),
        "parts": [asdict(part) for part in parts if max(part.token, part.decision) >= 0],
        "read otherwise": len(margins),
        "control: equal texts": control_equal,
        "control: read otherwise": control_misread,
        "largest margin read otherwise": max(margins, default=0.0),
    }


def _generate(model: GPUModel, prompt: list[int], count: int) -> list[tuple[int, int]]:
    """Return the device's greedy tokens, each with the hash of the decisions before it."""
    text = GPUText(model)
    return [(token, text.hash) for token in text.generate(prompt, count)]


def _part(number: int, expected: list[Choice], found: list[tuple[int, int]]) -> Part:
    both = list(zip(expected, found, strict=True))
    token = next((i for i, (own, other) in enumerate(both) if own.token != other[0]), -1)
    decision = next((i for i, (own, other) in enumerate(both) if own.hash != other[1]), -1)
    return Part(number, token, expected[token].margin if token >= 0 else 0.0, decision)


def _misread(logits: F32, text: list[Choice]) -> list[float]:
    """Return the CPU's margins at the tokens in whose place these logits' largest are others."""
    largest = logits[-len(text) :].argmax(axis=1)
    return [choice.margin for choice, other in zip(text, largest, strict=True)
            if choice.token != other]  # fmt: skip
