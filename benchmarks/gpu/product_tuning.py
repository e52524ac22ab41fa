"""Which tuning of the products is the fastest on a device, over decode layers of real sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from decode_layer import MODELS, PARTS, DecodeLayers, Key, Model, Part, Types
from device_time import graph_ms

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.gpu import GPU, open_gpu
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.tuning import Tuning

Q4_K, Q5_K, Q6_K, Q8_0, IQ4_XS = (
    GGMLType[name] for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS")
)
# waves, groups a core, stages, bytes of a tile
SHAPES = (
    (16, 1, 3, 2304), (16, 1, 4, 2304), (16, 1, 2, 4608), (8, 1, 4, 2304), (8, 1, 6, 2304),
    (8, 1, 3, 4608), (8, 2, 3, 2304), (8, 2, 2, 4608), (4, 4, 3, 2304), (4, 2, 6, 2304),
)  # fmt: skip
AHEADS = (0, 1024, 2048, 4096, 8192)
ROUNDS = 9
WITHIN_S = 55.0  # no case is begun later


@dataclass(frozen=True, slots=True)
class Case:
    """Layers of a model with these types, and the parts that are measured alone.

    `whole`: then all parts one after the other as well, with and without early starts.
    """

    model: Model
    types: Types
    parts: Sequence[Part]
    whole: bool = False


LARGE, SMALL = MODELS
CASES = (
    Case(LARGE, Types(Q4_K, Q4_K, Q4_K), PARTS, whole=True),
    Case(SMALL, Types(Q4_K, Q4_K, Q4_K), PARTS, whole=True),
    Case(LARGE, Types(Q5_K, Q4_K, Q5_K), ("mixer in", "experts out")),
    Case(LARGE, Types(Q8_0, Q4_K, Q6_K), ("mixer in", "experts out")),
    Case(SMALL, Types(Q8_0, Q4_K, Q6_K), ("mixer in", "experts out")),
    Case(LARGE, Types(IQ4_XS, IQ4_XS, Q4_K), ("mixer in", "experts in")),
)


@dataclass(frozen=True, slots=True)
class Found:
    """Microseconds of a part of a case for each tuning."""

    key: Key
    us: dict[Tuning, float]

    def excess(self, tuning: Tuning) -> float:
        """Logarithm of the time over the best one."""
        return math.log(self.us[tuning] / min(self.us.values())) if tuning in self.us else math.inf


def tune(device: str, nbytes: int, copy: float) -> None:
    """Measure all cases and print their best variants, then the table of tuning.py."""
    found: list[Found] = []
    best = replace(_tuning(SHAPES[0]), early=True)
    begin = time.perf_counter()
    for case in CASES:
        if time.perf_counter() - begin > WITHIN_S:
            print(f"not measured, it is late: {case.model.name} {case.types}", flush=True)
            continue
        gpu = open_gpu(device, 5 * nbytes + (64 << 20))
        layers = DecodeLayers(gpu, case.model, case.types, nbytes)
        of_parts = _parts(gpu, layers, case, copy)
        found += of_parts.values()
        if case.whole:
            best = _whole(gpu, layers, of_parts, copy)
        gpu.close()
    _print_table(found, best)


def _tuning(shape: tuple[int, int, int, int]) -> Tuning:
    waves, per_core, stages, tile = shape
    return Tuning(waves, per_core, stages, tile, held=96, early=True)


def _parts(gpu: GPU, layers: DecodeLayers, case: Case, copy: float) -> dict[Part, Found]:
    wanted = [(part, _tuning(shape)) for part, shape in product(case.parts, SHAPES)]
    runs = _compiled(gpu, layers, wanted)
    found = {part: Found(layers.keys()[part], {}) for part in case.parts}
    for part, tuning in runs:
        launches, nbytes = layers.launches({part: tuning}, part)
        us = graph_ms(gpu, launches, ROUNDS) * 1e3
        found[part].us[tuning] = us / len(launches)
        share, each = nbytes / (us * 1e-6) / copy, us / len(launches)
        what = f"{_name(layers)} {part:11} {_words(tuning)}"
        print(f"{what}: {each:7.2f} us, {share:.3f}", flush=True)
    return found


def _compiled(
    gpu: GPU, layers: DecodeLayers, wanted: Sequence[tuple[Part, Tuning]]
) -> list[tuple[Part, Tuning]]:
    """The variants that fit the device, all compiled."""
    jobs: list[tuple[str, dict[str, int]]] = []
    kernel, kept = gpu.kernel, []

    def note(unit: str, name: str, defines: dict[str, int]) -> int:
        jobs.append((unit, defines))
        return 0

    gpu.kernel = note  # type: ignore[method-assign, assignment]
    try:
        for part, tuning in wanted:
            before = len(jobs)
            try:
                launches, _ = layers.launches({part: tuning}, part)
            except DeviceError:
                launches = []
            if launches and _fits(gpu, launches[0], tuning):
                kept.append((part, tuning))
            else:
                del jobs[before:]
    finally:
        gpu.kernel = kernel  # type: ignore[method-assign]
    gpu.prepare(jobs)
    return kept


def _fits(gpu: GPU, launch: Launch, tuning: Tuning) -> bool:
    """Whether as many groups as the tuning wants find room on a core."""
    waves = launch.group[0] // gpu.runtime.wave
    room = gpu.runtime.shared_bytes + 1024
    return waves == tuning.waves and tuning.per_core * (launch.shared + 1024) <= room


def _whole(gpu: GPU, layers: DecodeLayers, found: dict[Part, Found], copy: float) -> Tuning:
    """Time whole layers with the best shape of each part, and with one shape for all.

    Returns early starts and bytes ahead of the fastest.
    """
    mixed = {part: min(f.us, key=lambda t: f.us[t]) for part, f in found.items()}
    same = [t for t in map(_tuning, SHAPES) if all(t in f.us for f in found.values())]
    rows = []
    for name, table in [
        ("best of each", mixed),
        *((_words(t), dict.fromkeys(PARTS, t)) for t in same),
    ]:
        for early, ahead in product((False, True), AHEADS):
            made = {p: replace(t, early=early, ahead=ahead) for p, t in table.items()}
            launches, nbytes = layers.launches(made)
            us = graph_ms(gpu, launches, ROUNDS) * 1e3
            rows.append((us, nbytes, len(launches), name, early, ahead))
    rows.sort()
    for us, nbytes, count, name, early, ahead in rows:
        each, share = us / count * len(PARTS), nbytes / (us * 1e-6) / copy
        how = f"{name}, {'early' if early else 'late '}, ahead {ahead}"
        print(f"{_name(layers)} whole layer {how:44}: {each:7.2f} us, {share:.3f}", flush=True)
    return replace(_tuning(SHAPES[0]), early=rows[0][4], ahead=rows[0][5])


def _print_table(found: Sequence[Found], best: Tuning) -> None:
    print(
        "best shapes of each kernel and type; early starts and bytes ahead of the last whole layer:"
    )
    for key in dict.fromkeys(f.key for f in found):
        mine = [f for f in found if f.key == key]
        tuning = min(mine[0].us, key=lambda t: sum(f.excess(t) for f in mine))
        t = replace(tuning, early=best.early, ahead=best.ahead)
        print(f'    ("{key[0]}", GGMLType.{key[1].name}): {t!r},')


def _name(layers: DecodeLayers) -> str:
    t = layers.types
    return f"{layers.model.name:4} {t.mixer.name}/{t.inner.name}/{t.down.name}"


def _words(t: Tuning) -> str:
    return f"{t.waves:2} x {t.per_core} waves {t.stages} x {t.tile}"
