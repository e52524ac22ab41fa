"""`fomoe logits`: the raw output of the model for a row of tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fomoe.cli.opening import opened
from fomoe.cli.options import EngineOptions, ModelOptions
from fomoe.cli.output import check_output, writing
from fomoe.errors import ConfigError


def parse_tokens(text: str) -> list[int]:
    """Return the token ids of a list such as `1,2,3`.

    Raises:
        ConfigError: something between the commas is not a whole number from 0.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is not a token id; write them as --tokens 1,2,3")
    return [int(part) for part in parts]


def logits(
    model: ModelOptions,
    engine: EngineOptions,
    tokens: Annotated[str, typer.Option(metavar="IDS", help="Token ids with commas: 1,2,3.")],
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the array goes.")],
    as_json: Annotated[bool, typer.Option("--json", help="Describe the result as JSON.")] = False,
) -> None:
    """Write the logits of each token as a NumPy file: float32, tokens x vocabulary."""
    ids = parse_tokens(tokens)
    check_output(output)
    engine = dataclasses.replace(engine, ctx_size=max(engine.ctx_size, len(ids)))
    with opened(model, engine) as llm:
        values = llm.logits(ids)
    with writing(output), output.open("wb") as file:
        np.save(file, values)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "shape": list(values.shape)}))
    else:
        typer.echo(f"{output}: float32 {list(values.shape)}")
