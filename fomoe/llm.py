"""The Python API: a running model as a context manager, on a Ray cluster or without."""

from __future__ import annotations

import atexit
import itertools
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import index
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fomoe.actors.names import DRIVER, STORAGE
from fomoe.actors.processes import ProcessLauncher
from fomoe.actors.supervisor import Supervisor
from fomoe.config import Budgets, EngineConfig, RoutingConfig, default_model, parse_bytes
from fomoe.engine.fill import read_profile
from fomoe.engine.hosting import free_vram, most_pinned
from fomoe.engine.plan import resolve
from fomoe.engine.requests import (
    Finished,
    FinishReason,
    GenerateRequest,
    Receipt,
    SamplingParams,
    TokenEvent,
)
from fomoe.errors import ConfigError, EngineError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.buffers import F32
from fomoe.model.tokenizer import Tokenizer
from fomoe.quality import car_quality, parse_quality, profile_beside, read_sensitivities
from fomoe.storage.segment import available_bytes

if TYPE_CHECKING:
    from fomoe.actors.cluster import Cluster
    from fomoe.model.chat import ChatTemplate

_NUMBERS = itertools.count()
_LAUNCHERS = ("ray", "processes")
_CALL_S = 10.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    receipt: Receipt


class LLM:
    """A running model: `with LLM("model.gguf", devices=["cpu", "cpu"]) as llm: ...`.

    Args:
        path: GGUF file, any shard; None takes the bundled model.
        devices: One name per device, e.g. `["cpu", "cpu"]` or "cpu,cpu".
        vram_budget: Bytes (or text such as "4GiB") for each device's expert slots.
        ram_budget: The same for each node's RAM tier.
        quality: What answers are held to, e.g. "kl=0.01" (see `fomoe.quality`); None leaves it to
            `routing`, which is exact unless told otherwise. A loss profile beside the file,
            MODEL.loss.json, is used where `routing` names no sensitivities.
        address: Ray cluster; None finds a running one or starts one, "local" always starts one.
        on_progress: Called with (share done, what) while loading.
        options: Any other field of `EngineConfig`, e.g. `ctx_size=8192` or
            `routing=RoutingConfig(car_capacity=40)`; `name`, the prefix of the actors' names; and
            `launcher`, "ray" or "processes": children of this process, on this machine alone.

    Raises ConfigError, BudgetError, GGUFError, DeviceError or EngineError; nothing is left running
    then.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        devices: str | list[str] | tuple[str, ...] = ("cpu",),
        vram_budget: int | str | None = None,
        ram_budget: int | str | None = None,
        quality: str | None = None,
        address: str | None = None,
        on_progress: Callable[[float, str], None] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        name = options.pop("name", f"fomoe-{os.getpid()}-{next(_NUMBERS)}")
        launcher = options.pop("launcher", "ray")
        if launcher not in _LAUNCHERS:
            raise ConfigError(f"launcher is {launcher!r}; choose one of {', '.join(_LAUNCHERS)}")
        model = default_model() if path is None else Path(path)
        options["routing"] = _routing(options.get("routing", RoutingConfig()), quality, model)
        config = EngineConfig(
            model=model,
            devices=tuple(devices.split(",") if isinstance(devices, str) else devices),
            budgets=Budgets(vram_bytes=_size(vram_budget), ram_bytes=_size(ram_budget)),
            **options,
        )
        self.file = open_gguf(config.model)
        self.spec = read_spec(self.file)
        table = ExpertTable.from_gguf(self.file, self.spec.n_layers)
        # Actors have working directories of their own.
        trace = None if config.trace is None else config.trace.absolute()
        profile = None if config.profile is None else config.profile.absolute()
        config = replace(config, model=config.model.resolve(), trace=trace, profile=profile)
        if profile is not None:  # what is wrong with it is told before anything starts
            read_profile(profile, self.spec.n_layers, self.spec.moe.n_experts)
        free = available_bytes(), free_vram(config), most_pinned(config)
        self.config = resolve(config, table, self.spec, *free)
        self.tokenizer = Tokenizer.from_gguf(self.file.metadata)
        self.cluster = _open_cluster(address) if launcher == "ray" else ProcessLauncher()
        try:
            self._engine: Supervisor | None = Supervisor(
                lambda: self.cluster.launch(self.file, self.spec, self.config, name, on_progress)
            )
        except BaseException:
            self.cluster.close()
            raise
        # The engine's threads must not meet the end of the interpreter.
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def engine(self) -> Supervisor:
        """The engine as the server sees it; EngineError after `close`."""
        if self._engine is None:
            raise EngineError("this LLM was closed")
        return self._engine

    @cached_property
    def chat(self) -> ChatTemplate:
        """The model's chat template; rendered in a process of its own, which `close` ends."""
        from fomoe.model.chat import ChatTemplate  # and jinja2, which answers without it spare

        return ChatTemplate.from_gguf(
            self.file.metadata, self.tokenizer, ctx_size=self.config.ctx_size
        )

    def plan_text(self) -> str:
        """Return what the budgets hold, for people."""
        return self.engine.plan.text()

    def cluster_text(self) -> str:
        """Return lines for people: how to look at the actors on the Ray cluster, if on one."""
        lines = self.cluster.hints()
        if not isinstance(self.cluster, ProcessLauncher):
            from fomoe.actors.cluster import niceness_hint

            nice = int(self.engine.running.handles[DRIVER].call("nice").result(_CALL_S))
            hint = niceness_hint(nice)
            lines += [] if hint is None else [hint]
        return "\n".join(lines)

    def read_stats(self) -> dict[str, float]:
        """Return what storage has read so far, added up over the nodes.

        `demand_bytes` over `demand_open_s`, the time in which at least one demand read was under
        way, is the rate that the drives gave; `prefetch_bytes` over `prefetch_open_s` alike.
        """
        totals: Counter[str] = Counter()
        for name, handle in self.engine.running.handles.items():
            if name.startswith(STORAGE):
                totals.update(handle.call("stats").result(_CALL_S))
        return dict(totals)

    def generate(
        self, prompt: str | list[int], *, max_tokens: int = 128, **sampling: Any
    ) -> Completion:
        """Return the whole continuation of a prompt (text or token ids).

        `sampling` are fields of `SamplingParams`, plus `quality` (a contract's text in place of
        the model's), `car` (short for quality "car=..."), `min_tokens` and `ignore_eos`.
        """
        ids: list[int] = []
        for event in self._events(prompt, max_tokens, sampling):
            if isinstance(event, TokenEvent):
                ids.append(event.token)
            elif isinstance(event, Finished):
                if event.error is not None:
                    raise EngineError(event.error)
                return Completion(self.tokenizer.decode(ids), ids, event.reason, event.receipt)
        raise EngineError("the engine ended without an answer")

    def stream(
        self, prompt: str | list[int], *, max_tokens: int = 128, **sampling: Any
    ) -> Iterator[str]:
        """Yield the continuation as text, piece by piece; closing the iterator cancels."""
        decoder = self.tokenizer.stream()
        for event in self._events(prompt, max_tokens, sampling):
            if isinstance(event, TokenEvent):
                if piece := decoder.push(event.token):
                    yield piece
            elif isinstance(event, Finished) and event.error is not None:
                raise EngineError(event.error)

    def logits(self, tokens: list[int]) -> F32:
        """Return the logits float32 [T, V] of a token sequence."""
        return self.engine.logits([index(i) for i in tokens], self.spec.vocab)

    def force(
        self,
        prompt: list[int],
        tokens: list[int],
        on_token: Callable[[TokenEvent], None],
        **fields: Any,
    ) -> Receipt:
        """Feed `tokens` one by one after a prompt, as if the model had generated them.

        `on_token` gets each one's event: what the model would have said in its place. `fields`
        are those of `GenerateRequest`, for example `quality`, `logprobs` or `logits`.

        Raises:
            EngineError: the engine failed.
        """
        request = GenerateRequest(
            request_id=f"llm-{os.getpid()}-{next(_NUMBERS)}",
            prompt=[index(i) for i in prompt],
            max_tokens=len(tokens),
            sampling=SamplingParams(temperature=0.0),
            forced=[index(i) for i in tokens],
            **fields,
        )
        for event in self.engine.stream(request):
            if isinstance(event, TokenEvent):
                on_token(event)
            elif isinstance(event, Finished):
                if event.error is not None:
                    raise EngineError(event.error)
                return event.receipt
        raise EngineError("the engine ended without an answer")

    def _events(
        self, prompt: str | list[int], max_tokens: int, sampling: dict[str, Any]
    ) -> Iterator[object]:
        ids = (
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else [index(i) for i in prompt]
        )
        ignore_eos = sampling.pop("ignore_eos", False)
        request = GenerateRequest(
            request_id=f"llm-{os.getpid()}-{next(_NUMBERS)}",
            prompt=ids,
            max_tokens=max_tokens,
            min_tokens=sampling.pop("min_tokens", 0),
            quality=_contract(sampling.pop("quality", None), sampling.pop("car", None)),
            stop_ids=frozenset() if ignore_eos else self.tokenizer.eos_ids,
            sampling=SamplingParams(**sampling),
        )
        return self.engine.stream(request)

    def close(self) -> None:
        """Stop the actors; a cluster that was there before stays as it was."""
        atexit.unregister(self._at_exit)
        engine, self._engine = self._engine, None
        if "chat" in self.__dict__:
            self.chat.close()
        if engine is not None:
            engine.close()
            self.cluster.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _routing(routing: RoutingConfig, quality: str | None, model: Path) -> RoutingConfig:
    """Return `routing` under a contract, with the sensitivities of the model's loss profile."""
    if quality is not None:
        routing = replace(routing, quality=parse_quality(quality))
    profile = None if routing.sensitivities else profile_beside(model)
    if profile is None:
        return routing
    return replace(routing, sensitivities=read_sensitivities(profile))


def _open_cluster(address: str | None) -> Cluster:
    """Imported here: what runs without Ray needs nothing that Ray brings along."""
    from fomoe.actors.cluster import Cluster

    return Cluster(address)


def _contract(quality: str | None, car: float | None) -> str | None:
    """Return a request's contract as text; ConfigError where both or something else is given."""
    if quality is not None and car is not None:
        raise ConfigError("car is short for quality car=...; give one of the two")
    if car is not None:
        return str(car_quality(car))
    return None if quality is None else str(parse_quality(quality))


def _size(value: int | str | None) -> int | None:
    return parse_bytes(value) if isinstance(value, str) else value


def _close(llm: weakref.ref[LLM]) -> None:
    """Close an LLM that nobody has closed; there may be none any more."""
    found = llm()
    if found is not None:
        found.close()
