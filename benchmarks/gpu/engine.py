"""What an engine's processes cost beside the device's own time: actors, messages, the driver.

Run: python benchmarks/gpu/engine.py --model bench/397b-a17b-4l.gguf [--two]
         [--attention device|driver|both] [--out r.json]

An engine of child processes, without Ray. Three ways through the layers: a message a token (exact,
all experts on one device), a message a layer (the driver decides, here by a contract whose price
changes nothing), and the serial twin. With --two, also two actors on the one device, which take
turns. With --attention driver, or both, the driver's process has all but the experts: exact, a
message a layer, and serial. Exact ways must all come to one hash, as `same hash` says. Per way:
milliseconds a token, microseconds a layer, and where the driver saw the time go; `bare` is the same
token by the model's own loop in one process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from filling import host_file

from fomoe.config import RoutingConfig
from fomoe.engine.requests import GenerateRequest, SamplingParams, TokenEvent
from fomoe.llm import LLM

PRICE = "price=0.000001"
SKIP = 8  # tokens that are not timed: graphs are captured in them


def bare_ms(model: Path, device: str, tokens: int) -> float:
    """Return the median milliseconds of a token by the model's own loop."""
    times = []
    with host_file(device, model, 1, graphs=True) as hosted:
        for position in range(SKIP + tokens):
            start = time.perf_counter()
            hosted.model.decode(hosted.text(position), position)
            hosted.model.decoded()
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[SKIP:])


def engine_times(llm: LLM, prompt: list[int], tokens: int, quality: str | None) -> dict[str, Any]:
    """Return milliseconds a token and where they went, and those of the prompt."""
    request = GenerateRequest(
        request_id=f"bench-{time.monotonic_ns()}", prompt=prompt, max_tokens=SKIP + tokens,
        sampling=SamplingParams(temperature=0.0), quality=quality, waterfall=True,
    )  # fmt: skip
    at: list[float] = []
    parts: list[list[float]] = []
    receipt = None
    for event in llm.engine.stream(request):
        if isinstance(event, TokenEvent):
            at.append(time.perf_counter())
            parts.append(event.parts_s)
        else:
            receipt = getattr(event, "receipt", receipt)
    assert receipt is not None
    gaps = [b - a for a, b in zip(at[SKIP:], at[SKIP + 1 :], strict=False)]
    means = [1e3 * statistics.mean(column) for column in zip(*parts[SKIP:], strict=True)]
    names = ("dense", "experts", "brain", "channel", "disk", "rest")
    ms = 1e3 * statistics.median(gaps)
    return {
        "ms per token": round(ms, 4),
        "us per layer": round(1e3 * ms / llm.spec.n_layers, 2),
        "parts ms": {name: round(value, 4) for name, value in zip(names, means, strict=True)},
        "prompt ms": round(receipt.prompt_ms, 2),
        "hash": receipt.decision_hash,
    }


WAYS = {
    "device": (("whole", None, True), ("by layer", PRICE, True), ("serial", None, False)),
    "driver": (("by layer", None, True), ("serial", None, False)),
}


def run(
    model: Path, devices: list[str], attention: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Bring an engine up and time each way through its layers."""
    found: dict[str, Any] = {"devices": devices}
    for name, quality, overlap in WAYS[attention]:
        start = time.perf_counter()
        with LLM(
            model, devices=devices, vram_budget=args.vram, ctx_size=4096, overlap=overlap,
            attention=attention,
            routing=RoutingConfig(shadow_every=0), launcher="processes",
        ) as llm:  # fmt: skip
            up_s = time.perf_counter() - start
            prompt = [(7 * i * i + 3 * i) % llm.spec.vocab for i in range(args.prompt)]
            engine_times(llm, prompt, 16, quality)  # first use of a prompt's programs
            found[name] = engine_times(llm, prompt[1:], args.tokens, quality) | {
                "up s": round(up_s, 1)
            }
        print(f"{len(devices)} device(s), attention in the {attention}, {name}: {found[name]}",
              flush=True)  # fmt: skip
    return found


def exact_hashes(result: dict[str, Any]) -> set[int]:
    """Return the decision hashes of all exact ways."""
    return {
        run[name]["hash"]
        for attention in WAYS.keys() & result.keys()
        for run in result[attention].values()
        for name, quality, _ in WAYS[attention]
        if quality is None
    }


def main() -> None:
    """Time an engine on one device, and perhaps on two actors of it; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--vram", default="40GiB", help="budget of each actor, with the driver's")
    parser.add_argument("--attention", default="device", choices=(*WAYS, "both"))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--two", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "model": args.model.name,
        "bare ms per token": round(bare_ms(args.model, args.device, args.tokens), 4),
    }
    for attention in WAYS if args.attention == "both" else [args.attention]:
        result[attention] = {"one": run(args.model, [args.device], attention, args)}
        if args.two:
            result[attention]["two"] = run(args.model, [args.device] * 2, attention, args)
    result["same hash"] = len(exact_hashes(result)) == 1
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
