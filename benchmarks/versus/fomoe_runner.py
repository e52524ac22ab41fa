"""fomoe behind the same JSON lines as `llama_runner.py`, through the actors that `serve` starts."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

from fomoe.engine.requests import (
    Finished,
    GenerateRequest,
    PromptProgress,
    Receipt,
    SamplingParams,
    TokenEvent,
)
from fomoe.llm import LLM


class Runner:
    """One engine on a Ray of its own."""

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._count = 0

    def load(self, path: str, threads: int, ctx: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Start the actors; `settings` are arguments of `LLM`."""
        start = time.perf_counter()
        self._llm = LLM(path, address="local", threads=threads, ctx_size=ctx, **settings)
        seconds = time.perf_counter() - start
        return {"load_ms": seconds * 1e3, "plan": self._llm.plan_text()}

    def run(self, first: int, prompt: int, decode: int) -> dict[str, Any]:
        """Process a new text: ids `first`.. as prompt, the following ones token by token.

        The prompt's time ends with the first token's logits; decoding is what lies between the
        first token and the last, `decode` passes through the model.
        """
        assert self._llm is not None
        self._count += 1
        request = GenerateRequest(
            request_id=f"bench-{self._count}",
            prompt=list(range(first, first + prompt)),
            max_tokens=decode + 1,
            forced=list(range(first + prompt, first + prompt + decode + 1)),
            sampling=SamplingParams(temperature=0.0),
        )
        before = self._llm.read_stats()
        times, receipt = [time.perf_counter()], Receipt()
        for event in self._llm.engine.stream(request):
            if isinstance(event, TokenEvent):
                times.append(time.perf_counter())
            elif isinstance(event, PromptProgress) and event.cached:
                raise RuntimeError(f"{event.cached} prompt tokens were reused")
            elif isinstance(event, Finished):
                if event.error is not None:
                    raise RuntimeError(event.error)
                receipt = event.receipt
        return {
            "prompt_ms": (times[1] - times[0]) * 1e3,
            "decode_ms": (times[-1] - times[1]) * 1e3,
            "receipt": asdict(receipt),
            "reads": {k: v - before[k] for k, v in self._llm.read_stats().items()},
        }

    def close(self) -> None:
        """Stop the actors and Ray."""
        if self._llm is not None:
            self._llm.close()


def main() -> None:
    """Answer requests until the input ends; what others print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = Runner()
    ops = {"load": runner.load, "run": runner.run}
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = ops[request.pop("op")](**request)
            except Exception as error:  # the other side decides what an error means
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=out, flush=True)
    finally:
        runner.close()


if __name__ == "__main__":
    main()
