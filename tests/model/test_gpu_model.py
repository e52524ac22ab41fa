"""A model's layers on an emulated GPU, against the golden vectors and against each other."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from reference.qwen35moe_f64 import forward, relative_l2
from support.emulated_gpu import emulated_gpu
from support.hosted_gpu import decode_logits, hosted, prefill_logits

from fomoe.engine.experts import ResidentExperts
from fomoe.errors import ConfigError, DeviceError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.gpu.host import GPUModel, planned_bytes
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.passes import bucket_sizes
from fomoe.model.gpu.slots import ExpertSlots, slot_bytes
from fomoe.model.layers import DenseModel
from fomoe.routing import Route, route_exact

VECTORS = Path(__file__).parents[1] / "vectors"
# Of tests/model/test_golden.py, for the same reasons.
BOUND = {"f32": 1e-4, "f16": 5e-3}
# Models whose types have kernels, and what the others are refused for. A float matrix's rows must
# be whole 32 values, which those of `f16_untied` are not.
NAMES = ("f32_fused", "f32_tied", "wide_q4_k_m")
REFUSED = {
    "f16_untied": "48 columns", "narrow_iq4_xs": "IQ4_NL", "narrow_q2_k": "Q[234]_",
    "narrow_q5_k_m": "Q5_1",
}  # fmt: skip
TOKENS = 12


def golden(name: str, tokens: int = TOKENS) -> tuple[Path, list[int], np.ndarray]:
    data = np.load(VECTORS / f"{name}.npz")
    return VECTORS / f"{name}.gguf", data["tokens"][:tokens].tolist(), data["logits"][:tokens]


@pytest.mark.parametrize("name", NAMES)
def test_golden_models_token_by_token(name: str) -> None:
    path, tokens, expected = golden(name)
    with hosted(path) as model:
        assert relative_l2(decode_logits(model, tokens), expected).max() <= BOUND["f32"]
        assert set(model.launches().values()) == {6}


def test_golden_model_as_prompts() -> None:
    path, tokens, expected = golden("f32_tied")
    with hosted(path, max_tokens=16) as model:
        whole = prefill_logits(model, tokens, TOKENS)
        assert relative_l2(whole, expected).max() <= BOUND["f32"]
        model.reset(0)
        parts = prefill_logits(model, tokens, 5)
        assert relative_l2(parts, expected).max() <= BOUND["f32"]
        model.reset(0)
        mixed = prefill_logits(model, tokens[:7], 7), decode_logits(model, tokens[7:], 7)
        assert relative_l2(np.concatenate(mixed), expected).max() <= BOUND["f32"]


def test_prompts_of_any_length_run_on_grids_of_their_size() -> None:
    assert bucket_sizes(1) == []
    assert bucket_sizes(48) == [48]
    assert bucket_sizes(2048) == [32, 128, 512, 2048]
    path, tokens, expected = golden("f32_tied", 60)
    with hosted(path, max_tokens=128) as model:
        short, long = prefill_logits(model, tokens[:9], 9), prefill_logits(model, tokens[9:], 51, 9)
    assert relative_l2(np.concatenate([short, long]), expected).max() <= BOUND["f32"]


@pytest.mark.parametrize("name", ["f32_tied", "wide_q4_k_m"])  # heads of 16 and 32
def test_f16_cache_rounds_keys_and_values_and_nothing_else(name: str) -> None:
    """Far below the bound where it would still be: nothing else is rounded to half, either."""
    path, tokens, _ = golden(name)
    expected = forward(path, tokens, kv="f16").logits
    with hosted(path, kv_dtype="f16", max_tokens=16) as model:
        assert relative_l2(prefill_logits(model, tokens, 16), expected).max() <= 0.2 * BOUND["f32"]
        model.reset(0)
        assert relative_l2(decode_logits(model, tokens), expected).max() <= 0.2 * BOUND["f32"]


def test_int8_activations_are_rounded_as_specified() -> None:
    """As in test_golden.py: a value on the edge of two steps moves all that comes after it."""
    path, tokens, _ = golden("wide_q4_k_m", 24)
    pairs = np.array(tokens).reshape(-1, 2).tolist()
    exact = {"decode": 0, "prompt": 0}
    with hosted(path, int8=True, max_tokens=16) as model:
        for pair in pairs:
            expected = forward(path, pair, activations="int8").logits
            model.reset(0)
            exact["decode"] += relative_l2(decode_logits(model, pair), expected).max() <= 1e-4
            model.reset(0)
            exact["prompt"] += relative_l2(prefill_logits(model, pair, 2), expected).max() <= 1e-4
    assert min(exact.values()) >= len(pairs) // 2, exact


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_no_kernel_takes_are_refused_by_type(name: str) -> None:
    path, _, _ = golden(name)
    with pytest.raises(DeviceError, match=REFUSED[name]), hosted(path):
        pass


def test_graphs_and_single_launches_give_the_same_bits() -> None:
    path, tokens, _ = golden("f32_tied")
    found = []
    for graphs in (True, False):
        with hosted(path, graphs=graphs, max_tokens=16) as model:
            prompt = prefill_logits(model, tokens[:8], 8)
            found.append(np.concatenate([prompt, decode_logits(model, tokens[8:], 8)]))
    np.testing.assert_array_equal(*found)


def test_states_are_set_aside_copied_and_taken_up_again() -> None:
    path, tokens, _ = golden("f32_tied")
    with hosted(path, n_states=2) as model:
        decode_logits(model, tokens[:5])
        kept = model.states.snapshot(0, 5)
        model.copy_state(1, 0, 5)
        expected = decode_logits(model, tokens[5:], 5)
        np.testing.assert_array_equal(decode_logits(model, tokens[5:], 5, state=1), expected)
        model.states.restore(0, kept)
        np.testing.assert_array_equal(decode_logits(model, tokens[5:], 5), expected)
        with pytest.raises(DeviceError, match="state 2"):
            model.reset(2)


def host_routes(model: GPUModel, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """What the host's router chooses, ids ascending, and weights."""
    route = route_exact(model.scores(layer), model.spec.moe.top_k)
    order = np.argsort(route.ids, axis=1)
    return np.take_along_axis(route.ids, order, 1), np.take_along_axis(route.weights, order, 1)


def joined_pass(model: GPUModel, token: int, position: int, *, own: bool = False) -> np.ndarray:
    """A token with halves that follow each other queued as one; `own`: by the device's choice."""
    last = model.spec.n_layers - 1
    model.begin_and_front(np.array([token], np.int32), position, 0)
    for layer in range(last):
        model.back_and_front(layer, None if own else host_routes(model, layer))
    if own:
        model.own_back(last)
    else:
        model.back(last, *host_routes(model, last))
    return model.logits([0]).copy()


def host_pass(models: list[GPUModel], tokens: list[int], position: int) -> np.ndarray:
    """A pass as a driver runs it: routes by the host, layer l on device l mod n; logits [T, V]."""
    spec, ids = models[0].spec, np.array(tokens, np.int32)
    hidden = models[0].runtime.pinned(4 * spec.hidden * len(tokens))
    for model in models:
        model.begin(ids, position, 0)
    models[0].embed()
    for layer in range(spec.n_layers):
        model = models[layer % len(models)]
        if layer and len(models) > 1:
            model.put_hidden(hidden.device_address)
        model.front(layer)
        model.back(layer, *host_routes(model, layer))
        if len(models) > 1:
            model.take_hidden(hidden.device_address)
    logits = model.logits(range(len(tokens))).copy()
    models[0].runtime.unpin(hidden)
    return logits


def test_the_hosts_routes_on_one_device_and_on_two() -> None:
    """The host's softmax may differ in the last bit from the device's; places may not matter."""
    path, tokens, expected = golden("f32_tied")
    found = []
    for parts in (((0, 1, 2),), ((0, 2), (1,))):
        with ExitStack() as stack:
            models = [
                stack.enter_context(hosted(path, layers=layers, max_tokens=16,
                                           embedding=0 in layers, head=2 in layers))
                for layers in parts
            ]  # fmt: skip
            prompt = host_pass(models, tokens[:7], 0)
            rows = [host_pass(models, [token], 7 + i) for i, token in enumerate(tokens[7:])]
            found.append(np.concatenate([prompt, *rows]))
            if len(models) == 1:
                models[0].reset(0)
                host_pass(models, tokens[:7], 0)
                joined = [joined_pass(models[0], t, 7 + i) for i, t in enumerate(tokens[7:])]
                np.testing.assert_array_equal(joined, rows)
                models[0].reset(0)
                whole = decode_logits(models[0], tokens[:2])
                models[0].reset(0)
                chosen = [joined_pass(models[0], tokens[i], i, own=True)[0] for i in (0, 1)]
                np.testing.assert_array_equal(chosen, whole)
    np.testing.assert_array_equal(*found)
    assert relative_l2(found[0], expected).max() <= BOUND["f32"]


@pytest.mark.parametrize("stay", [1, 2])
def test_experts_that_the_host_computes(stay: int) -> None:
    """The last ones by id by the CPU kernels on what the device gives, the others there."""
    path, tokens, expected = golden("f32_tied")
    file = open_gguf(path)
    found = []
    with hosted(path, ahead=True, arm=True) as model:
        spec, top_k = model.spec, model.spec.moe.top_k
        arm = ResidentExperts(file, spec, 1, int8=False, threads=1)
        added = model.runtime.pinned(4 * spec.hidden)
        for position, token in enumerate(tokens):
            model.begin(np.array([token], np.int32), position)
            model.embed()
            for layer in range(spec.n_layers):
                model.front(layer, gives_input=True)
                route = route_exact(model.scores(layer), top_k)
                assert model.ahead() is None
                order = np.argsort(route.ids)
                ids, weights = (np.take_along_axis(a, order, 1)
                                for a in (route.ids, route.weights))  # fmt: skip
                model.back(layer, ids[:, :-stay], weights[:, :-stay])
                mine = Route(ids[:, -stay:].copy(), weights[:, -stay:].copy(), None)
                arm.begin(layer, model.input(), mine, decoding=True)
                added.array.view(np.float32)[: spec.hidden] = arm.finish()[0]
                model.add(added.device_address)
            found.append(model.logits([0])[0].copy())
    assert top_k == 2, "one case leaves the device nothing"
    assert relative_l2(np.stack(found), expected).max() <= BOUND["f32"]


def test_the_next_router_speaks_before_and_after_the_experts() -> None:
    path, tokens, _ = golden("f32_fused")
    file = open_gguf(path)
    spec = read_spec(file)
    dense = DenseModel(file, spec, 1, int8=False)
    hidden = np.zeros((1, spec.hidden), np.float32)
    with hosted(path, ahead=True, layers=(0, 1)) as model:
        model.begin(np.array(tokens[:1], np.int32), 0, 0)
        model.embed()
        for layer in range(2):
            streams = []
            for half in (lambda: None, lambda at=layer: model.front(at)):
                half()
                model.runtime.copy(hidden.ctypes.data, model._work.x, hidden.nbytes, model.stream)
                model.runtime.synchronize(model.stream)
                streams.append(hidden.copy())
            found = model.foreseen()
            assert found is not None
            assert found[0] == layer
            assert model.foreseen() is None
            assert relative_l2(found[1], dense.look_ahead(layer, streams[0])).max() <= 1e-5
            scores, ahead = model.scores(layer), model.ahead()
            assert ahead is not None
            assert relative_l2(ahead, dense.look_ahead(layer + 1, streams[1])).max() <= 1e-5
            route = route_exact(scores, spec.moe.top_k)
            model.back(layer, np.sort(route.ids), route.weights)


def test_a_part_of_a_model_does_its_part_only() -> None:
    path, tokens, _ = golden("f32_tied")
    with hosted(path, layers=(1,), embedding=False, head=False) as model:
        model.begin(np.array(tokens[:1], np.int32), 0)
        for verb, match in (
            (model.embed, "first layer"), (lambda: model.logits([0]), "last layer"),
            (lambda: model.decode(1, 0), "1 of 3 layers"),
        ):  # fmt: skip
            with pytest.raises(DeviceError, match=match):
                verb()


def test_an_expert_that_is_not_resident_is_named() -> None:
    path, tokens, _ = golden("f32_tied")
    with hosted(path) as model:
        model.slots.set(1, 3, None)
        model.begin(np.array(tokens[:1], np.int32), 0)
        with pytest.raises(DeviceError, match=r"layer 1: experts \[3\]"):
            model.back(1, np.array([[2, 3]], np.int32), np.ones((1, 2), np.float32))


def test_largest_is_that_of_the_logits() -> None:
    path, tokens, _ = golden("f32_tied")
    with hosted(path) as model:
        model.decode(tokens[0], 0)
        found, row = model.decoded(), model.logits([0])[0]
        assert (found.token, found.logit) == (int(row.argmax()), float(row.max()))
        log_sum = np.log(np.exp(row.astype(np.float64)).sum())
        assert found.log_sum == pytest.approx(log_sum, abs=1e-5)
        assert found.weights.sum(axis=1) == pytest.approx(1, abs=1e-6)
        assert (np.diff(found.ids, axis=1) > 0).all()


def test_rows_that_a_pass_has_not_are_refused() -> None:
    path, tokens, _ = golden("f32_tied")
    with hosted(path) as model:
        model.decode(tokens[0], 0)
        for row in (-1, 1):
            with pytest.raises(DeviceError, match=rf"rows \[{row}\]: the pass has 1"):
                model.logits([row])
            with pytest.raises(DeviceError, match="the pass has 1"):
                model.largest(row)
        with pytest.raises(DeviceError, match="logits of 2 rows: ask for 1 to 1"):
            model.logits([0, 0])


def test_a_row_may_be_asked_for_twice() -> None:
    path, tokens, _ = golden("f32_tied")
    with hosted(path, max_tokens=4) as model:
        model.decode(tokens[0], 0)
        one = model.logits([0])[0].copy()
        for row in model.logits([0, 0]):
            np.testing.assert_allclose(row, one, rtol=1e-5, atol=1e-5)
        with pytest.raises(DeviceError, match="logits of 99 rows: ask for 1 to"):
            model.logits([0] * 99)


def test_slots_that_did_not_fit_may_be_fewer() -> None:
    file = open_gguf(golden("f32_tied")[0])
    spec = read_spec(file)
    table = ExpertTable.from_gguf(file, spec.n_layers)
    with emulated_gpu(arena_bytes=4 << 20) as gpu:
        slots, others = ExpertSlots(gpu, table, spec, (0,)), [0] * (len(table.classes) - 1)
        with pytest.raises(DeviceError, match="bytes asked of"):
            slots.add([*others, 1 << 20] if others else [1 << 20])
        slots.add([2, *others])
        first, second = (slots.slot_address(0, slot) for slot in range(2))
        end = gpu.arena.base + gpu.arena.used
        assert second + slot_bytes(slots.layout(0)) <= end < first + (1 << 20)


def test_every_launch_of_a_token_is_timed() -> None:
    path, tokens, _ = golden("f32_tied")
    with hosted(path) as model:
        times = model.time_launches(tokens[0], 0)
        names = [name for name, _ in times]
        assert names.count("experts out") == model.spec.n_layers
        assert all(micros >= 0 for _, micros in times)
        assert model.time_token(tokens[0], 0, count=2) > 0


def test_the_plan_holds_what_is_taken() -> None:
    path, _, _ = golden("f32_tied")
    file = open_gguf(path)
    spec = read_spec(file)
    options = HostOptions(layers=(0, 1, 2), ctx_size=64, kv_dtype="f32", int8=False, max_tokens=16)
    with hosted(path, max_tokens=16) as model:
        each = [slot_bytes(model.slots.layout(layer)) for layer in options.layers]
        taken = model.gpu.arena.used - spec.moe.n_experts * sum(each)
    planned = planned_bytes(file, spec, options)
    assert 0.5 * planned < taken <= planned


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": (1, 0)},
        {"layers": (0, 9)},
        {"kv_dtype": "q8_0"},
        {"n_states": 0},
        {"part": "half"},
    ],
)
def test_parts_that_no_model_has_are_refused(wrong: dict[str, object]) -> None:
    path, _, _ = golden("f32_tied")
    with pytest.raises(ConfigError), hosted(path, **wrong):
        pass


def test_passes_that_do_not_fit_are_refused() -> None:
    path, _, _ = golden("f32_tied")
    with hosted(path, ctx_size=8) as model:
        for tokens, position in ((2, 0), (0, 0), (1, 8), (1, -1)):
            with pytest.raises(DeviceError, match="position"):
                model.begin(np.zeros(tokens, np.int32), position)


def test_tokens_that_the_vocabulary_has_not_are_refused() -> None:
    path, _, _ = golden("f32_tied")
    with hosted(path, max_tokens=4) as model:
        for token in (-1, model.spec.vocab):
            with pytest.raises(DeviceError, match=rf"token {token}: the vocabulary has"):
                model.decode(token, 0)
            with pytest.raises(DeviceError, match=rf"token {token}: the vocabulary has"):
                model.begin(np.array([0, token, 1], np.int32), 0)
