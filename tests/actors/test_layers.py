"""Layers on devices: the bits, text and decisions of the CPU path, whatever way a pass takes."""

import os
import re
import signal

import numpy as np
import pytest
from support import cpu_layers
from support.cpu_runtime import CpuRuntime
from support.local_engine import local_engine
from support.local_model import finished, greedy, tokens_of, told

from fomoe.actors import driver_dense, layers
from fomoe.config import RoutingConfig
from fomoe.engine import plan
from fomoe.engine.local import local_logits
from fomoe.errors import BudgetError, DeviceError, StorageError

VRAM = 1 << 30
CAPACITY = 6
MODES = {
    "exact": {},
    "car": {"quality": "car=0.6"},
    "price": {"quality": "price=0.05"},
    "kl": {"quality": "kl=0.05"},
    "touched": {"null_share": 0.5},
}


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    return cpu_layers.play_devices(monkeypatch)


@pytest.fixture(scope="module")
def want(local_models, prompt):
    model = local_models["mixed"]
    return {
        mode: told(
            model.run(greedy(prompt, 24, logprobs=4, **ask), model.sequence(capacity=CAPACITY))
        )
        for mode, ask in MODES.items()
    }


@pytest.mark.parametrize(
    ("n_devices", "options"),
    [
        *((n, {"overlap": overlap}) for n in (1, 2, 3) for overlap in (True, False)),
        *((n, {"attention": "driver"}) for n in (1, 3)),
    ],
)
def test_text_and_decisions_are_those_of_the_cpu_path(
    model_paths, want, prompt, n_devices, options
):
    with local_engine(
        model_paths["mixed"], devices=("hip:0",) * n_devices, vram=VRAM, prefill_chunk=16,
        routing=RoutingConfig(car_capacity=CAPACITY), **options,
    ) as engine:  # fmt: skip
        for mode, ask in MODES.items():
            got = told(list(engine.client.stream(greedy(prompt, 24, logprobs=4, **ask))))
            assert got == want[mode], mode


def test_a_request_takes_one_message_a_token_where_all_is_on_one_device(
    model_paths, local_models, prompt, opened
):
    with local_engine(model_paths["mixed"], devices=("cuda:0",), vram=VRAM) as engine:
        got = list(engine.client.stream(greedy(prompt, 9)))
        calls, server = opened[0].calls, engine.handles["gpu-0"].actor._server
        assert calls.count("whole") == 9  # the prompt, then a token at a time
        assert server.steps == 10  # and the prompt's logits
    assert tokens_of(got) == tokens_of(local_models["mixed"].run(greedy(prompt, 9)))
    receipt = finished(got).receipt
    assert receipt.devices == "vram"
    assert receipt.hits_device == 8 * 4 * 3
    assert receipt.nvme_bytes == 0


def test_one_message_a_layer_where_the_driver_decides(model_paths, prompt):
    with local_engine(
        model_paths["mixed"], devices=("cuda:0",), vram=VRAM,
        routing=RoutingConfig(shadow_every=0),
    ) as engine:  # fmt: skip
        server = engine.handles["gpu-0"].actor._server
        list(engine.client.stream(greedy(prompt, 2, quality="car=0.6")))
        before = server.steps
        list(engine.client.stream(greedy(prompt, 10, quality="car=0.6")))
        prompts = 4 + 1 + 1  # layers, the first front, and the logits
        assert server.steps - before == prompts + 9 * (4 + 1)


def test_logits_and_echoes_are_those_of_the_cpu_path(model_paths, prompt, local_models):
    with local_engine(
        model_paths["fused"], devices=("hip:0", "hip:1"), vram=VRAM, prefill_chunk=7
    ) as engine:  # fmt: skip
        want = local_logits(model_paths["fused"], prompt)
        assert np.array_equal(engine.client.logits(prompt, 300), want)
        ask = greedy(prompt, 3, echo=True, logprobs=2)
        got = list(engine.client.stream(ask))
        want = local_models["fused"].run(ask)
        assert [e for e in got if hasattr(e, "logprobs")] == [
            e for e in want if hasattr(e, "logprobs")
        ]


def test_a_text_goes_on_where_the_last_one_ended(model_paths, prompt, local_models):
    with local_engine(model_paths["mixed"], devices=("hip:0",), vram=VRAM) as engine:
        first = tokens_of(list(engine.client.stream(greedy(prompt, 4))))
        longer = [*prompt, *first[:3], 5, 9]
        got = list(engine.client.stream(greedy(longer, 4)))
        assert finished(got).receipt.cached_tokens == len(prompt) + 3
        assert tokens_of(got) == tokens_of(local_models["mixed"].run(greedy(longer, 4)))


@pytest.mark.parametrize("n_devices", [1, 2])
def test_traces_are_those_of_the_cpu_path(model_paths, prompt, tmp_path, n_devices):
    asks = [greedy(prompt, 12), greedy(prompt, 12, quality="car=0.6")]
    traces = []
    for name in ("cpu", "hip:0"):
        path = tmp_path / f"{name[:3]}.trace"
        with local_engine(
            model_paths["mixed"], devices=(name,) * n_devices, vram=VRAM, ram=0, trace=path,
            prefill_chunk=16, routing=RoutingConfig(car_capacity=CAPACITY),
        ) as engine:  # fmt: skip
            for ask in asks:
                list(engine.client.stream(ask))
        traces.append(path.read_bytes())
    assert traces[0] == traces[1]


@pytest.mark.parametrize("boxes", [(0, 1), (1, 1)])
def test_devices_of_two_boxes(model_paths, want, prompt, boxes):
    """Two on the far one hand over in its memory, whatever the driver's copy says."""
    with local_engine(
        model_paths["mixed"], devices=("hip:0", "hip:0"), device_box=boxes, vram=VRAM,
        transport="tcp", routing=RoutingConfig(car_capacity=CAPACITY),
    ) as engine:  # fmt: skip
        driver = engine.handles["driver"].actor
        calls, shown = driver._hands.host._calls, set()
        regions_of = calls._regions

        def noted(link, *args):
            regions = regions_of(link, *args)
            shown.update((link.number, arena) for arena, *_ in regions)
            return regions

        calls._regions = noted
        for _ in range(3):
            got = told(list(engine.client.stream(greedy(prompt, 24, logprobs=4))))
            assert got == want["exact"]
    own = {(i, f"step-{i}") for i in range(2)}
    assert shown == (own if boxes == (1, 1) else own | {(0, "step-1"), (1, "step-0")})


def test_waiting_for_another_device_is_no_wait_for_bytes(model_paths, prompt):
    with local_engine(model_paths["mixed"], devices=("hip:0",) * 2, vram=VRAM) as engine:
        events = list(engine.client.stream(greedy(prompt, 16)))
    assert finished(events).error is None
    assert finished(events).receipt.stall_ms == 0.0


def test_experts_pass_through_few_slots(model_paths, prompt, local_models, monkeypatch, opened):
    monkeypatch.setattr(plan, "FREE_BYTES", 2 << 20)
    with local_engine(model_paths["mixed"], devices=("hip:0", "hip:1"), vram=VRAM) as engine:
        segment = engine.handles["storage-0"].actor._segment
        assert segment.nbytes < 3 << 20
        for device in (0, 1):
            table = opened[device].slots.published
            assert np.count_nonzero(table) == 2 * 20
        got = tokens_of(list(engine.client.stream(greedy(prompt, 4))))
    assert got == tokens_of(local_models["mixed"].run(greedy(prompt, 4)))
    assert all(device.closed and not device.runtime.registered for device in opened)


class TestRefusals:
    def start(self, path, **options):
        with local_engine(path, **options):
            pytest.fail("it came up")

    def test_a_node_through_which_experts_cannot_pass(self, model_paths):
        with pytest.raises(BudgetError, match="node 0: RAM that experts pass through to VRAM"):
            self.start(model_paths["mixed"], devices=("hip:0",), vram=12 << 20, ram=1000)

    def test_a_gpu_that_does_not_hold_its_dense_part(self, model_paths):
        with pytest.raises(BudgetError, match="dense weights"):
            self.start(model_paths["mixed"], devices=("hip:0",), vram=1 << 20)

    def test_a_gpu_that_the_driver_cannot_have(self, model_paths, monkeypatch, opened):
        open_dense = driver_dense.open_dense

        def refuse(file, spec, device, options):
            if device == "hip:1":
                raise DeviceError("hip:1: no 5 bytes in one piece")
            return open_dense(file, spec, device, options)

        monkeypatch.setattr(driver_dense, "open_dense", refuse)
        with pytest.raises(DeviceError, match="driver: hip:1: no 5 bytes"):
            self.start(
                model_paths["small"], devices=("hip:0", "hip:1"), vram=VRAM, attention="driver"
            )
        assert len(opened) == 3  # two with experts, and the driver's first
        assert all(device.closed for device in opened)

    def test_a_contract_that_needs_a_second_state(self, model_paths, prompt):
        with local_engine(
            model_paths["mixed"], devices=("hip:0",), vram=VRAM,
            routing=RoutingConfig(shadow_every=0),
        ) as engine:  # fmt: skip
            events = list(engine.client.stream(greedy(prompt, 4, quality="kl=0.1")))
            assert "quality kl=0.1 needs a second state" in finished(events).error
            assert engine.client.status().state == "ready"
            assert len(tokens_of(list(engine.client.stream(greedy(prompt, 4))))) == 4


class TestFaults:
    def test_a_device_that_fails_while_loading(self, model_paths, monkeypatch):
        def run_away(self, *args, **options):
            raise DeviceError("out of everything")

        monkeypatch.setattr(CpuRuntime, "copy", run_away)
        with (
            pytest.raises(DeviceError, match="gpu-0: hip:3: out of everything"),
            local_engine(model_paths["small"], devices=("hip:3",), vram=VRAM),
        ):
            pytest.fail("it came up")

    @pytest.mark.parametrize(
        ("n_devices", "attention", "verb", "who"),
        [
            (1, "device", "back", "gpu-0: hip:0: "),
            (2, "device", "back", "gpu-[01]: hip:0: "),  # whichever comes to it first
            (1, "driver", "back", "gpu-0: hip:0: "),
            (2, "driver", "close_layer", ""),  # real drivers say the device's name themselves
        ],
    )
    def test_a_device_that_fails_in_a_token(
        self, model_paths, prompt, monkeypatch, n_devices, attention, verb, who, wait_for
    ):
        def run_away(self, *args, **options):
            raise DeviceError("the kernel has run away")

        with local_engine(
            model_paths["small"], devices=("hip:0",) * n_devices, vram=VRAM, attention=attention
        ) as engine:
            events = []
            for event in engine.client.stream(greedy(prompt, 400)):
                events.append(event)
                if len(tokens_of(events)) == 3:
                    monkeypatch.setattr(cpu_layers.CpuLayers, verb, run_away)
            assert re.search(f"{who}the kernel has run away", finished(events).error)
            wait_for(lambda: engine.client.status().state == "degraded")
            assert "run away" in engine.client.status().detail

    def test_a_device_that_fails_between_requests(self, model_paths, monkeypatch, wait_for):
        def run_away(self):
            raise DeviceError("an illegal address")

        with local_engine(model_paths["small"], devices=("hip:0",), vram=VRAM) as engine:
            monkeypatch.setattr(layers.LayerActor, "_poll", run_away)
            wait_for(lambda: engine.client.status().state == "degraded")
            assert "gpu-0: hip:0: an illegal address" in engine.client.status().detail

    def test_a_read_that_fails_while_loading(self, model_paths, tmp_path):
        own = tmp_path / "own.gguf"
        data = model_paths["small"].read_bytes()
        own.write_bytes(data)

        def cut(fetch):
            os.truncate(own, len(data) // 2)
            return 0.0

        with (
            pytest.raises(StorageError),
            local_engine(own, devices=("hip:0",), vram=VRAM, delay=cut),
        ):
            pytest.fail("it came up")

    def test_a_killed_device(self, model_paths, prompt, monkeypatch, wait_for):
        cpu_layers.play_processes(monkeypatch)
        with local_engine(
            model_paths["mixed"], devices=("hip:0", "hip:0"), vram=VRAM, attention="driver"
        ) as engine:
            events = []
            for event in engine.client.stream(greedy(prompt, 4000)):
                events.append(event)
                if len(tokens_of(events)) == 2:
                    os.kill(engine.handles["gpu-1"].process.pid, signal.SIGKILL)
            assert "gpu-1 has died" in finished(events).error
            wait_for(lambda: engine.client.status().state == "degraded", 2)
