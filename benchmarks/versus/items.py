"""The table of what is compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of the comparison.

    `model` is a file in the models' folder, None the bundled one. The prompt goes in at once; then
    `decode` tokens follow one by one (0: the prompt is what is timed). `memory_share` limits both
    engines to that share of the file's size. `bar` is the ratio that fomoe is meant to reach.
    """

    name: str
    title: str
    model: str | None
    prompt: int
    decode: int = 0
    memory_share: float | None = None
    bar: float = 1.0

    @property
    def ctx(self) -> int:
        """Context length, a whole number of 256."""
        return -(-(self.prompt + self.decode + 2) // 256) * 256

    @property
    def unit_tokens(self) -> int:
        """Tokens that the timed part processes."""
        return self.decode or self.prompt


_DECODE_35B = "decode, 35B-A3B shapes, 8 layers, in RAM"
_LIMITED = "397B-A17B shapes, 4 layers, memory for a quarter"

ITEMS = {
    item.name: item
    for item in (
        Item(
            name="demo-decode", title="decode, bundled model, in RAM",
            model=None, prompt=64, decode=256,
        ),
        Item(name="35b-decode", title=_DECODE_35B, model="35b-8l.gguf", prompt=64, decode=64),
        Item(
            name="35b-prefill-512", title="prompt of 512, 35B-A3B shapes, 8 layers, in RAM",
            model="35b-8l.gguf", prompt=512,
        ),
        Item(
            name="35b-prefill-2048", title="prompt of 2048, 35B-A3B shapes, 8 layers, in RAM",
            model="35b-8l.gguf", prompt=2048,
        ),
        Item(
            name="397b-decode-quarter", title=f"decode, {_LIMITED}",
            model="397b-4l.gguf", prompt=64, decode=64, memory_share=0.25, bar=2.5,
        ),
        Item(
            name="397b-prefill-quarter", title=f"prompt of 1024, {_LIMITED}",
            model="397b-4l.gguf", prompt=1024, memory_share=0.25, bar=1.5,
        ),
    )
}  # fmt: skip
