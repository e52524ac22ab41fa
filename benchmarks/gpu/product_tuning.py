"""Which tuning of the products is the fastest on a device.

Three questions, each with a table: the routed experts of a layer by the type of their down,
launches included; whole DeltaNet layers, where each launch begins beside the one before it;
matrices alone. Times are microseconds, shares those of the copy bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from decode_layer import MODELS, PARTS, DecodeLayers, Model, Part, Types
from device_time import graph_ms
from product_cases import ExpertsCase, LayerSizes, MatrixCase
from side_by_side import Job, rehearse

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.gpu import GPU, open_gpu
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.tuning import Kernel, Tuning, tuning_of

Q4_K, Q5_K, Q6_K, Q8_0, IQ4_XS = (
    GGMLType[name] for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS")
)
# waves, groups a core, stages, bytes of a tile
SHAPES = (
    (16, 1, 3, 2304), (16, 1, 4, 2304), (16, 1, 2, 4608), (16, 1, 4, 1280), (20, 1, 3, 2304),
    (22, 1, 3, 2304), (22, 1, 4, 1280), (24, 1, 2, 2304), (32, 1, 2, 2304), (32, 1, 3, 1280),
    (32, 1, 3, 2304), (16, 2, 2, 2304),
)  # fmt: skip
# Of devices with 64 KiB of shared memory, where waves are cheaper than rings.
SMALL_SHAPES = tuple(
    (waves, per_core, stages, tile)
    for waves in (2, 4, 8)
    for per_core in (1, 2, 4)
    for stages, tile in ((2, 1280), (2, 2304), (2, 4608), (3, 1280))
)
SMALL_BYTES = 64 << 10
HELD = (96, 40)  # words of activations in a lane's registers
MATRICES = (Q4_K, Q5_K, Q6_K, Q8_0, IQ4_XS)
LAYER = LayerSizes(hidden=4096, width=1024, shared=1024, top_k=10)
EXPERTS = ((Q4_K, Q4_K), (Q4_K, Q5_K), (Q4_K, Q6_K))  # of gate and up, of down
LARGE, SMALL = MODELS
LAYERS = ((LARGE, Types(Q4_K, Q4_K, Q4_K)), (SMALL, Types(Q4_K, Q4_K, Q6_K)))
ROUNDS = 9
MOST_THREADS = 1024  # of a group, on every device
LAUNCHES = len(PARTS) + 1  # of a layer
WITHIN_S = 80.0  # no table is begun later

Key = tuple[Kernel, GGMLType]
Variant = tuple[str, Tuning]  # of a part


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest tuning of a kernel for a type, and where it was found."""

    key: Key
    tuning: Tuning
    us: float
    where: str


def tune(device: str, nbytes: int, copy: float) -> None:
    """Measure, print a line for each variant, and in the end the lines of tuning.py."""
    begin = time.perf_counter()
    found: list[Best] = []
    tables: list[Callable[[], list[Best]]] = []
    tables += [lambda t=types: _experts(device, t, nbytes, copy) for types in EXPERTS]  # type: ignore[misc]
    tables += [lambda m=m, t=t: _layers(device, m, t, nbytes, copy) for m, t in LAYERS]  # type: ignore[misc]
    tables += [lambda k=kind: _matrices(device, k, nbytes, copy) for kind in MATRICES]  # type: ignore[misc]
    for table in tables:
        if time.perf_counter() - begin > WITHIN_S:
            print("it is late: the other tables are not measured", flush=True)
            break
        found += table()
    print("best of each kernel, type and table:")
    for best in found:
        kernel, kind = best.key
        print(f'    ("{kernel}", GGMLType.{kind.name}): {best.tuning!r},  # {best.where}')


def _tunings(gpu: GPU, held: int = HELD[0]) -> list[Tuning]:
    """What is tried on a device, beside what its table says."""
    runtime = gpu.runtime
    shapes = SMALL_SHAPES if runtime.shared_bytes <= SMALL_BYTES else SHAPES
    early = tuning_of(runtime, "project", Q4_K).early
    return [
        Tuning(waves, per_core, stages, tile, held=held, early=early)
        for waves, per_core, stages, tile in shapes
        if waves * runtime.wave <= MOST_THREADS
    ]


def _words(t: Tuning) -> str:
    return f"{t.waves:2} x {t.per_core} waves {t.stages} x {t.tile} held {t.held}"


def _matrices(device: str, kind: GGMLType, nbytes: int, copy: float) -> list[Best]:
    gpu = open_gpu(device, int(nbytes * 1.3) + (64 << 20))
    case = MatrixCase(gpu, kind, LAYER.hidden, nbytes)

    def launches(_: str, tuning: Tuning) -> list[Launch]:
        case.tuning = tuning
        return case.launches()

    own = tuning_of(gpu.runtime, "project_rows", kind)
    tunings = [own, *(t for held in HELD for t in _tunings(gpu, held))]
    ready = _ready(gpu, launches, [("", t) for t in tunings])
    us = {t: graph_ms(gpu, launches("", t), ROUNDS) * 1e3 / 4 for _, t in ready}
    _print_shares(case.name, us, case.nbytes, copy)
    gpu.close()
    return [_best(("project_rows", kind), us, case.name)]


def _experts(device: str, types: tuple[GGMLType, GGMLType], nbytes: int, copy: float) -> list[Best]:
    """Routed experts, launches included: first the shapes of down, then those of gate and up."""
    gpu = open_gpu(device, int(nbytes * 1.3) + (64 << 20))
    case, best = ExpertsCase(gpu, LAYER, types, nbytes), []
    keys: dict[str, Key] = {"out": ("experts_out", types[1]), "in": ("experts_in", types[0])}
    table = {part: tuning_of(gpu.runtime, *key) for part, key in keys.items()}

    def launches(part: str, tuning: Tuning) -> list[Launch]:
        now = {**table, part: tuning}
        case.tunings = now["in"], now["out"]
        return case.launches()

    for part, key in keys.items():
        variants = [(part, t) for t in (table[part], *_tunings(gpu))]
        of_part = slice(part == "out", None, 2)
        ready = _ready(gpu, lambda p, t, s=of_part: launches(p, t)[s], variants)  # type: ignore[misc]
        us = {t: graph_ms(gpu, launches(part, t), ROUNDS) * 1e3 for _, t in ready}
        name = f"{case.name}, tuned {key[0]}"
        _print_shares(name, us, case.nbytes, copy)
        best.append(_best(key, us, name))
        table[part] = best[-1].tuning
    launches("in", table["in"])
    print(f"error {case.check():.1e}", flush=True)
    gpu.close()
    return best


def _layers(device: str, model: Model, types: Types, nbytes: int, copy: float) -> list[Best]:
    """Whole layers: part by part the shape that makes all of them fastest."""
    gpu = open_gpu(device, 5 * nbytes + (64 << 20))
    layers, best = DecodeLayers(gpu, model, types, nbytes), []
    keys = layers.keys()
    table = {part: tuning_of(gpu.runtime, *keys[part]) for part in PARTS}
    variants = [(part, t) for part in PARTS for t in (table[part], *_tunings(gpu))]
    ready = _ready(gpu, lambda p, t: layers.launches({**table, p: t}, p)[0], variants)
    whose = f"{model.name} {types.mixer.name}/{types.inner.name}/{types.down.name} layer"
    for part in PARTS:
        us = {t: _layer_us(gpu, layers, {**table, part: t}) for p, t in ready if p == part}
        name = f"{whose}, tuned {part}"
        launches, moved = layers.launches(table)
        _print_shares(name, us, moved / len(launches) * LAUNCHES, copy)
        best.append(_best(keys[part], us, name))
        table[part] = best[-1].tuning
    late = {part: replace(t, early=False) for part, t in table.items()}
    print(f"{whose}, late: {_layer_us(gpu, layers, late):.2f} us", flush=True)
    gpu.close()
    return best


def _layer_us(gpu: GPU, layers: DecodeLayers, table: Mapping[Part, Tuning]) -> float:
    launches, _ = layers.launches(table)
    return graph_ms(gpu, launches, ROUNDS) * 1e3 / len(launches) * LAUNCHES


def _print_shares(name: str, us: Mapping[Tuning, float], nbytes: float, copy: float) -> None:
    print(name)
    for tuning, each in sorted(us.items(), key=lambda item: item[1]):
        share = nbytes / (each * 1e-6) / copy
        print(f"    {_words(tuning):31} {each:8.2f} us, {share:.3f}", flush=True)


def _best(key: Key, us: Mapping[Tuning, float], where: str) -> Best:
    tuning = min(us, key=lambda t: us[t])
    return Best(key, tuning, us[tuning], where)


def _ready(
    gpu: GPU, launches: Callable[[str, Tuning], Sequence[Launch]], variants: Sequence[Variant]
) -> list[Variant]:
    """The variants that fit the device, each once, all compiled."""
    jobs: list[Job] = []
    kept = []
    for part, tuning in dict.fromkeys(variants):
        try:
            wanted, made = rehearse(gpu, lambda p=part, t=tuning: launches(p, t))  # type: ignore[misc]
        except DeviceError:  # not one wave has room
            continue
        if _fits(gpu, made[0], tuning):
            kept.append((part, tuning))
            jobs += wanted
    gpu.prepare(jobs)
    return kept


def _fits(gpu: GPU, launch: Launch, tuning: Tuning) -> bool:
    """Whether as many waves and groups as the tuning wants find room on a core."""
    waves = launch.group[0] // gpu.runtime.wave
    room = gpu.runtime.shared_bytes + 1024
    return waves == tuning.waves and tuning.per_core * (launch.shared + 1024) <= room
