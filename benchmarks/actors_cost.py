"""What a driver in a process of its own and two device actors cost, against one process.

Run: python benchmarks/actors_cost.py MODEL.gguf [--tokens 64] [--rounds 5] [--threads 2]

Both decode the same ids on the same file with every expert in memory, one after the other in each
round; the model must fit twice. One process: the same dense layers and kernels, experts in its own
memory. The last line is JSON; a ratio of 1.1 means that the actors take a tenth longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

from fomoe.engine.experts import ResidentExperts
from fomoe.engine.forward import Forward
from fomoe.engine.generation import Generation
from fomoe.engine.meter import HostCounters, Meter
from fomoe.engine.requests import Finished, GenerateRequest, Receipt, SamplingParams
from fomoe.engine.sequences import Sequence
from fomoe.errors import EngineError
from fomoe.gguf.reader import open_gguf
from fomoe.llm import LLM
from fomoe.model.archs import read_spec
from fomoe.model.layers import DenseModel
from fomoe.residency import LogicalRules

PROMPT = 8
_NUMBERS = itertools.count()


def request(tokens: int) -> GenerateRequest:
    """Decode `tokens` ids after a short prompt, both consecutive numbers."""
    return GenerateRequest(
        request_id=f"cost-{next(_NUMBERS)}", prompt=list(range(PROMPT)), max_tokens=tokens + 1,
        forced=list(range(PROMPT, PROMPT + tokens + 1)), sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip


def milliseconds(receipt: Receipt) -> float:
    """Milliseconds per decode step; the first token comes out of the prompt's pass."""
    return receipt.generated_ms / (receipt.generated_tokens - 1)


class OneProcess:
    """The layer loop over experts in this process's own memory."""

    def __init__(self, path: Path, threads: int, ctx: int) -> None:
        file = open_gguf(path)
        spec = read_spec(file)
        model = DenseModel(file, spec, PROMPT, int8=True)
        experts = ResidentExperts(file, spec, PROMPT, int8=True, threads=threads)
        self._forward = Forward(model, experts, prefetch=False)
        self._sequence = Sequence(spec, ctx, "f16", LogicalRules(capacity=spec.moe.n_experts))

    def run(self, tokens: int) -> float:
        """Return milliseconds per token."""
        loss, watch = self._forward.brain.loss, self._forward.watch
        meter = Meter(HostCounters(), loss, watch, devices="none", capacity=1)
        generation = Generation(
            request(tokens), self._sequence, self._forward, meter, chunk=PROMPT, default_car=0.0
        )
        while not generation.finished:
            for event in generation.step():
                if isinstance(event, Finished):
                    return milliseconds(event.receipt)
        raise EngineError("the request ended without a receipt")


def run_actors(llm: LLM, tokens: int) -> float:
    """Return milliseconds per token."""
    for event in llm.engine.stream(request(tokens)):
        if isinstance(event, Finished):
            if event.error is not None:
                raise EngineError(event.error)
            return milliseconds(event.receipt)
    raise EngineError("the request ended without a receipt")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ctx = PROMPT + args.tokens + 2
    one = OneProcess(args.model, args.threads, ctx)
    with LLM(
        args.model, devices=["cpu", "cpu"], ctx_size=ctx, threads=args.threads, address="local"
    ) as llm:
        run_actors(llm, args.tokens), one.run(args.tokens)  # touches every page once
        rounds = [(one.run(args.tokens), run_actors(llm, args.tokens)) for _ in range(args.rounds)]
    for alone, actors in rounds:
        print(f"one process {alone:8.3f} ms   actors {actors:8.3f} ms   {actors / alone:.3f}")
    ratio = statistics.median(actors / alone for alone, actors in rounds)
    print(json.dumps({"model": args.model.name, "threads": args.threads, "tokens": args.tokens,
                      "rounds_ms": rounds, "ratio": ratio}))  # fmt: skip


if __name__ == "__main__":
    main()
