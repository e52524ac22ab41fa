"""`fomoe profile`: how often a text wants each expert, for a warm start."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import typer

from fomoe.cli.opening import opened, progress_bar
from fomoe.cli.options import EngineOptions, ModelOptions
from fomoe.cli.output import check_output, writing
from fomoe.engine.requests import Finished, GenerateRequest
from fomoe.errors import ConfigError, EngineError
from fomoe.residency import frequencies_of, pack_profile
from fomoe.traces import Trace

if TYPE_CHECKING:
    from fomoe.llm import LLM

_BLOCK = 1024  # tokens of a trace that are counted at a time


def profile(
    model: ModelOptions,
    engine: EngineOptions,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text like what will be asked.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the profile goes.")
    ],
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of the text that are run.")
    ] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Describe the result as JSON.")] = False,
) -> None:
    """Record which experts a text wants; --profile FILE then starts with them in memory."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: {error}; give a text in UTF-8") from None
    check_output(output)
    engine = dataclasses.replace(engine, quality=None, car=None)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".profile-") as directory:
        trace = Path(directory) / "trace"
        with opened(model, engine, trace=trace) as llm:
            _run_text(llm, llm.tokenizer.encode(content)[:tokens])
        counts, seen = _counted(Trace.open(trace))
    if not seen:
        raise ConfigError(f"{text} has no tokens; give a longer text")
    with writing(output):
        output.write_bytes(pack_profile(frequencies_of(counts, seen)))
    used = int(np.count_nonzero(counts))
    if as_json:
        typer.echo(json.dumps({"output": str(output), "tokens": seen, "experts": used}))
    else:
        typer.echo(f"{output}: {used:,} of {counts.size:,} experts were wanted by {seen:,} tokens")


def _run_text(llm: LLM, ids: list[int]) -> None:
    """Run the tokens through the layers, exactly, a context at a time."""
    window = llm.config.ctx_size
    with progress_bar() as progress:
        task = progress.add_task("reading the text", total=len(ids))
        for number, part in enumerate(_windows(ids, window)):
            request = GenerateRequest(
                request_id=f"profile-{number}", prompt=part, max_tokens=0, quality="exact"
            )
            for event in llm.engine.stream(request):
                if isinstance(event, Finished) and event.error is not None:
                    raise EngineError(event.error)
            progress.advance(task, len(part))


def _windows(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _counted(trace: Trace) -> tuple[npt.NDArray[np.int64], int]:
    """Return how many tokens wanted each expert, int64 [L, E], and how many tokens there are."""
    facts = trace.facts
    counts = np.zeros((facts.n_layers, facts.n_experts), np.int64)
    for start in range(0, len(trace), _BLOCK):
        wanted = trace.ids[start : start + _BLOCK, :, : facts.top_k]
        for layer in range(facts.n_layers):
            counts[layer] += np.bincount(wanted[:, layer].ravel(), minlength=facts.n_experts)
    return counts, len(trace)
