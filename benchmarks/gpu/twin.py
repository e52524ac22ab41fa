"""The twin beside the two actors in turn: milliseconds a token, predicted and measured.

Run: python benchmarks/gpu/twin.py --bandwidth bandwidth.json --pingpong pingpong.json
     [--model FILE] [--turn-us 140] [--out r.json]

The twin is `fomoe plan`'s, and all it hears of the card is what `bandwidth.py` has measured: copies
within the card as the rate of its kernels, copies over the bus as its link. The engine's own times
are those of the machine's file. Of the run it hears the share of activations in VRAM and the delay
that was added to each layer; everything else is in RAM, so the drive is never asked.

The twin gives each device a link of its own. Two actors of one card share its link and compute in
turns, as one device with both budgets does: so that is what it is told, and the way from actor to
actor, once a layer, is part of the layer's own time. That way is the engine's `handoff_s`, or with
`turns` what two processes were measured to pay for taking turns on a card. The range is over the
same corners as `fomoe plan`'s. Inputs may be logs whose last line is the JSON, which this prints
last, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # where `synthetic` lies

from memory_file import MemoryFile, spec_of
from synthetic.model_file import Recipe
from synthetic.shapes import SHAPES

from fomoe.errors import ConfigError
from fomoe.sim.decode import decode
from fomoe.sim.forecast import Corner, Span, corners, in_corner
from fomoe.sim.loads import assumed_loads
from fomoe.sim.machine import Machine, find_machine
from fomoe.sim.schedule import Outcome, Schedule
from fomoe.sim.shapes import ModelShape, shape_of, shape_of_file

LANES = 400  # tokens that are simulated
WITHIN = 0.15
RUNS = ("alone", "plain", "delayed")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a run was, and how long it took.

    Attributes:
        measured_ms: of a token.
        context: tokens that attention reads.
        hits: share of activations whose expert lay in VRAM.
        delay_s: what was added to each layer.
        crossed_mb: measured megabytes a token over the link, guesses in vain among them.
    """

    measured_ms: float
    context: int
    hits: float = 1.0
    delay_s: float = 0.0
    crossed_mb: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Milliseconds a token, over the corners and without look-ahead; megabytes over the link."""

    ms: Span
    blind_ms: float
    crossed_mb: float
    binds: str


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file, or the last line of a log."""
    text = path.read_text()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = json.loads(text.strip().splitlines()[-1])
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not what bandwidth.py or pingpong.py prints")
    return found


def model_shape(model: Path | None, name: str) -> ModelShape:
    """Return the sizes of the model file, or of the synthetic one of that name, SHAPE-Nl.gguf.

    Raises:
        ConfigError: there is no file, and the name is none of a synthetic one.
    """
    if model is not None:
        return shape_of_file(model)
    shape, _, depth = Path(name).stem.rpartition("-")
    if shape not in SHAPES or not depth.removesuffix("l").isdigit():
        raise ConfigError(f"{name} is no synthetic model of a known shape: give --model FILE")
    layers = int(depth.removesuffix("l"))
    file: Any = MemoryFile(Recipe(shape=SHAPES[shape], layers=layers))
    return shape_of(file, spec_of(SHAPES[shape], layers))


def card(base: Machine, bandwidth: Mapping[str, Any]) -> Machine:
    """Return the machine with the bandwidths of a card: one device, one link."""
    rate, bus = float(bandwidth["device_copy"]), bandwidth["bus"]
    device = replace(base.device, count=1, dense_rate=rate, expert_rate=rate,
                     link_rate=float(bus["to_device"]))  # fmt: skip
    return replace(base, devices=(device,),
                   host=replace(base.host, memory_rate=float(bus["both_ways"])))  # fmt: skip


def cases(result: Mapping[str, Any], actors: str, layers: int) -> Iterator[tuple[str, Case]]:
    """Yield what `pingpong.py` has timed with one number of actors, by name."""
    run = result.get(actors, {})
    context = result["tokens"] // 2
    compute = run.get("plain", {}).get("compute ms", 0.0)
    hits = run.get("hits in VRAM", result.get("hits in VRAM"))
    for name in RUNS:
        if name not in run:
            continue
        timed = run[name]
        if name == "alone":
            case = Case(measured_ms=timed["ms"], context=context)
        else:
            delay_ms = timed["compute ms"] - compute
            case = Case(
                measured_ms=timed["wall ms"], context=context, hits=hits,
                delay_s=1e-3 * delay_ms / layers, crossed_mb=timed["MB per token"],
            )  # fmt: skip
        yield name, case


def predict(
    machine: Machine, shape: ModelShape, case: Case, *, handoffs: bool = False, turn_s: float = 0.0
) -> Prediction:
    """Predict a case.

    Args:
        machine: one device.
        shape: the model.
        case: what is run.
        handoffs: whether every layer comes from another actor.
        turn_s: what that takes, if not the machine's `handoff_s`; no corner changes it.
    """

    def outcome(corner: Corner) -> Outcome:
        box = in_corner(machine, corner)
        soft = box.software
        way = (turn_s or soft.handoff_s) if handoffs else 0.0
        box = replace(box, software=replace(soft, layer_s=soft.layer_s + way))
        # The delay is a kernel before the layer's own: as many bytes as are read meanwhile.
        delay = case.delay_s * box.device.dense_rate
        longer = replace(shape, layer_bytes=shape.layer_bytes + delay)
        loads = assumed_loads((case.hits, 1.0 - case.hits, 0.0), shape.top_k, shape.n_layers,
                              LANES, seed=0)  # fmt: skip
        return decode(box, longer, loads, Schedule(recall=corner.recall), context=case.context)

    found = [outcome(corner) for corner in corners(machine)]
    middle = corners(machine)[1]
    return Prediction(
        ms=Span.of([1e3 / each.tokens_per_s for each in found]),
        blind_ms=1e3 / outcome(replace(middle, recall=0.0)).tokens_per_s,
        crossed_mb=float(found[1].link_bytes.mean()) / 1e6,
        binds=found[1].binds,
    )


def compared(case: Case, prediction: Prediction) -> dict[str, Any]:
    """Return a prediction beside what was measured."""
    ms = prediction.ms
    ratio = ms.mid / case.measured_ms
    return {
        "predicted ms": [round(each, 4) for each in (ms.low, ms.mid, ms.high)],
        "predicted / measured": round(ratio, 4),
        f"within {WITHIN:.0%}": abs(ratio - 1) <= WITHIN,
        "without guesses ms": round(prediction.blind_ms, 4),
        "MB per token": round(prediction.crossed_mb, 2),
        "binds": prediction.binds,
    }


def compare(
    machine: Machine, shape: ModelShape, run: Mapping[str, Any], turn_s: float
) -> dict[str, Any]:
    """Compare everything that a run of `pingpong.py` has timed.

    Two actors are predicted twice, with turns and without, one only without.
    """
    result: dict[str, Any] = {}
    for actors in ("two", "one"):
        for name, case in cases(run, actors, shape.n_layers):
            found: dict[str, Any] = {
                "measured ms": case.measured_ms, "measured MB per token": case.crossed_mb,
                "hits in VRAM": case.hits, "delay us per layer": round(1e6 * case.delay_s, 1),
            }  # fmt: skip
            for turns in (True, False) if actors == "two" else (False,):
                way = predict(machine, shape, case, handoffs=actors == "two",
                              turn_s=turn_s if turns else 0.0)  # fmt: skip
                found["turns" if turns else "no turns"] = compared(case, way)
            result.setdefault(actors, {})[name] = found
    return result


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line per run and one per prediction."""
    for actors, name in ((actors, name) for actors in ("two", "one") for name in RUNS):
        found = result.get(actors, {}).get(name)
        if found is None:
            continue
        yield (
            f"{actors} actor(s), {name}: {found['hits in VRAM']:.1%} in VRAM, "
            f"measured {found['measured ms']:.3f} ms, {found['measured MB per token']:.1f} MB"
        )
        for turns in ("turns", "no turns"):
            if turns in found:
                way = found[turns]
                low, mid, high = way["predicted ms"]
                yield (
                    f"  {turns:8}: predicted {mid:.3f} ms ({low:.3f} to {high:.3f}; without "
                    f"guesses {way['without guesses ms']:.3f}), {way['MB per token']:.1f} MB, "
                    f"predicted / measured {way['predicted / measured']:.3f}"
                )


def main() -> None:
    """Predict, compare, print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bandwidth", type=Path, required=True, help="what bandwidth.py printed")
    parser.add_argument("--pingpong", type=Path, required=True, help="what pingpong.py wrote")
    parser.add_argument("--model", type=Path, help="its model file, unless a synthetic one")
    parser.add_argument("--machine", default="h200", help="for all but bandwidths")
    parser.add_argument("--turn-us", type=float, default=140.0, help="of two processes, a turn")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    run = read_json(args.pingpong)
    machine = card(find_machine(args.machine), read_json(args.bandwidth))
    shape = model_shape(args.model, run["model"])
    result = {
        "model": run["model"], "turn us": args.turn_us,
        "copy GB/s": round(machine.device.dense_rate / 1e9, 1),
        "link GB/s": round(machine.device.link_rate / 1e9, 2),
        **compare(machine, shape, run, 1e-6 * args.turn_us),
    }  # fmt: skip
    print(*lines(result), sep="\n")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
