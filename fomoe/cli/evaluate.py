"""`fomoe eval ppl`: perplexity of a text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from fomoe.cli.eval_options import measuring
from fomoe.cli.opening import opened, progress_bar
from fomoe.cli.options import EngineOptions, ModelOptions
from fomoe.errors import ConfigError
from fomoe.evaluation.divergence import negative_log_likelihoods

MIN_CTX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Surprise over the scored tokens; only figures per byte compare between tokenizers.

    Attributes:
        nll: Sum of negative log probabilities, in nats.
        chunks: Windows that were scored.
        tokens: Tokens that were scored.
        words: Words and ends of lines in the scored text.
        text_bytes: UTF-8 bytes of the scored text.
    """

    nll: float
    chunks: int
    tokens: int
    words: int
    text_bytes: int

    def figures(self) -> dict[str, float | int]:
        """Return what is printed."""
        return {
            "token_ppl": math.exp(self.nll / self.tokens),
            "word_ppl": math.exp(min(self.nll / max(self.words, 1), 700.0)),
            "bits_per_byte": self.nll / math.log(2) / max(self.text_bytes, 1),
            "nll": self.nll,
            "chunks": self.chunks,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.text_bytes,
        }


def scored_positions(ctx: int) -> range:
    """Return the positions of a window whose next token is scored: its second half."""
    return range(ctx // 2, ctx - 1)


def perplexity(
    ids: Sequence[int],
    ctx: int,
    logits: Callable[[list[int]], npt.NDArray[np.float32]],
    token_bytes: Callable[[int], bytes],
) -> Perplexity:
    """Score a text in windows of `ctx` tokens; a shorter rest at its end is left out.

    Args:
        ids: The tokens of the text.
        ctx: Tokens per window; each window starts from an empty state.
        logits: Gives [T, V] for T tokens.
        token_bytes: Gives the bytes that a token stands for.

    Raises:
        ConfigError: the text is shorter than one window.
    """
    n_chunks = len(ids) // ctx
    if n_chunks == 0:
        raise ConfigError(
            f"the text has {len(ids):,} tokens, fewer than one window of {ctx:,}; use --ctx"
        )
    positions = scored_positions(ctx)
    nll, text = 0.0, b""
    for start in range(0, n_chunks * ctx, ctx):
        window = list(ids[start : start + ctx])
        targets = window[positions.start + 1 : positions.stop + 1]
        rows = logits(window)[positions.start : positions.stop]
        nll += float(negative_log_likelihoods(rows, np.array(targets, np.int64)).sum())
        text += b"".join(map(token_bytes, targets))
    return Perplexity(
        nll=nll,
        chunks=n_chunks,
        tokens=n_chunks * len(positions),
        words=len(text.split()) + text.count(b"\n"),
        text_bytes=len(text),
    )


def ppl(
    model: ModelOptions,
    engine: EngineOptions,
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to score.")],
    ctx: Annotated[int, typer.Option(metavar="N", min=MIN_CTX, help="Tokens per window.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after this many windows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity: windows of N tokens without BOS, the second half of each is scored."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text cannot be read: {error}") from None
    with opened(model, measuring(engine, ctx)) as llm:
        ids = llm.tokenizer.encode(content)
        ids = ids if chunks is None else ids[: chunks * ctx]
        with progress_bar() as progress:
            task = progress.add_task("scoring", total=max(len(ids) // ctx, 1))

            def scored(window: list[int]) -> npt.NDArray[np.float32]:
                rows = llm.logits(window)
                progress.advance(task)
                return rows

            figures = perplexity(ids, ctx, scored, llm.tokenizer.token_bytes).figures()
    if as_json:
        typer.echo(json.dumps(figures | {"ctx": ctx, "model": str(model.path)}))
    else:
        for name, value in figures.items():
            typer.echo(
                f"{name:>14}  {value:,.6g}" if name != "nll" else f"{name:>14}  {value:,.3f}"
            )
