"""`fomoe run`: one answer, or a chat in the terminal."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fomoe.cli.answering import Answer, answer, make_request
from fomoe.cli.opening import opened, progress_bar
from fomoe.cli.options import EngineOptions, ModelOptions, TraceOptions
from fomoe.engine.requests import PromptProgress, SamplingParams
from fomoe.errors import RequestError
from fomoe.server.receipts import prompt_line, tier_line

if TYPE_CHECKING:
    from fomoe.llm import LLM

_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the answer is drawn."""

    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 512
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the likeliest token.")
    ] = _SAMPLING.temperature
    top_p: Annotated[float, typer.Option(min=0, max=1)] = _SAMPLING.top_p
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all tokens.")] = _SAMPLING.top_k
    seed: Annotated[int, typer.Option(min=0)] = _SAMPLING.seed

    def params(self) -> SamplingParams:
        """Return them as the engine takes them."""
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The one thing that is asked, where it is not a chat."""

    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and end.")
    ] = None
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt's text; no chat template.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="With --prompt: print the answer as JSON.")
    ] = False


class Session:
    """Asks the model and shows what it says; keeps the conversation."""

    def __init__(self, llm: LLM, sampling: SamplingOptions, system: str | None) -> None:
        self._llm = llm
        self._sampling = sampling
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str, out: Console, *, raw: bool = False) -> Answer:
        """Answer one turn, or continue `text` itself when `raw`; text goes to `out` as it comes."""
        if raw:
            return self._answer(self._llm.tokenizer.encode(text), out)
        messages = [*self._messages, {"role": "user", "content": text}]
        result = self._answer(self._llm.chat.prompt_ids(messages), out)
        self._messages = [*messages, {"role": "assistant", "content": result.text}]
        return result

    def _answer(self, prompt: list[int], out: Console) -> Answer:
        room = self._llm.engine.ctx_size - len(prompt)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(prompt):,} tokens and the context "
                f"{self._llm.engine.ctx_size:,}; start anew or raise --ctx-size"
            )
        request = make_request(
            prompt,
            self._llm.tokenizer,
            max_tokens=min(self._sampling.max_tokens, room),
            sampling=self._sampling.params(),
        )
        with progress_bar() as bar:
            task = bar.add_task("reading the prompt", total=len(prompt))

            def show(text: str) -> None:
                bar.stop()
                out.print(text, end="", markup=False, highlight=False, soft_wrap=True)

            def advance(progress: PromptProgress) -> None:
                bar.update(task, completed=progress.processed, description=prompt_line(progress))

            return asyncio.run(
                answer(
                    self._llm.engine,
                    self._llm.tokenizer,
                    request,
                    on_text=show,
                    on_progress=advance,
                )
            )


def _chat(session: Session, out: Console, err: Console) -> None:
    err.print("Ctrl-C stops an answer, Ctrl-D ends the chat.", style="dim")
    while True:
        try:
            text = out.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if not text.strip():
            continue
        try:
            receipt = session.ask(text, out).receipt
            out.print()
            err.print(tier_line(receipt), style="dim", markup=False, highlight=False)
        except KeyboardInterrupt:
            err.print("\nstopped", style="dim")
        except RequestError as error:
            err.print(str(error), style="red", markup=False)


def run(
    model: ModelOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    recording: TraceOptions,
    request: Request,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instruction that comes first.")
    ] = None,
) -> None:
    """Chat with a model in the terminal, or answer one prompt."""
    if request.prompt is None and (request.raw or request.as_json):
        raise typer.BadParameter("--raw and --json need --prompt")
    err = Console(stderr=True)
    with opened(model, engine, trace=recording.trace) as llm:
        session = Session(llm, sampling, system)
        if request.prompt is None:
            _chat(session, Console(), err)
            return
        result = session.ask(request.prompt, Console(quiet=request.as_json), raw=request.raw)
        if request.as_json:
            typer.echo(json.dumps(asdict(result)))
        else:
            typer.echo()
            err.print(tier_line(result.receipt), style="dim", markup=False, highlight=False)
