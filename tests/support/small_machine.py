"""A small machine and model for the twin's tests."""

import dataclasses

import numpy as np

from fomoe.sim.loads import Loads, assumed_loads
from fomoe.sim.machine import Device, Drive, Host, Machine, Network, Software
from fomoe.sim.shapes import ModelShape

LAYERS = 6
EXPERT = 1e6


def small_shape():
    return ModelShape(
        name="small", n_layers=LAYERS, n_experts=32, top_k=4, hidden=256,
        expert_bytes=np.full(LAYERS, EXPERT), slot_bytes=np.full(LAYERS, EXPERT),
        layer_bytes=np.full(LAYERS, 2e6),
        shared_bytes=np.full(LAYERS, 5e5), head_bytes=3e6, kv_bytes=1e3, state_bytes=1e5,
        dense_macs=1e7, expert_macs=1e7,
    )  # fmt: skip


def make_machine(*, nodes=1, devices=2, drives=1, link=4e9, drive=1e9, layer_s=1e-5):
    return Machine(
        name="made-up", title="made up", nodes=nodes,
        host=Host(ram_bytes=8e9, memory_rate=30e9, cpu_rate=20e9),
        devices=(Device(count=devices, memory_bytes=1e9, dense_rate=20e9, expert_rate=10e9,
                        link_rate=link, matrix_rate=1e12),),
        drives=(Drive(count=drives, rate=drive, latency_s=5e-5, request_s=1e-6),),
        software=Software(layer_s=layer_s, handoff_s=2e-6, token_s=1e-4, reads_s=3e-5),
        network=Network(rate=1e9, latency_s=3e-5) if nodes > 1 else None,
        sources={},
    )  # fmt: skip


def make_loads(shares=(0.5, 0.2, 0.3), owners=1, tokens=40, seed=3):
    drawn = assumed_loads(shares, 4, LAYERS, tokens, seed)
    if owners == 1:
        return drawn
    rng = np.random.default_rng(seed)
    parts = {}
    for name in ("device", "ram", "nvme", "demoted"):
        whole = getattr(drawn, name)[..., 0]
        split = rng.multinomial(whole, np.full(owners, 1 / owners))
        parts[name] = split.astype(np.int16)
    return Loads(**parts)


def scaled(machine, **factors):
    """The machine with some rates multiplied: drive, link, expert."""
    device, drive = machine.devices[0], machine.drives[0]
    device = dataclasses.replace(
        device,
        link_rate=device.link_rate * factors.get("link", 1),
        expert_rate=device.expert_rate * factors.get("expert", 1),
    )
    drive = dataclasses.replace(drive, rate=drive.rate * factors.get("drive", 1))
    return dataclasses.replace(machine, devices=(device,), drives=(drive,))
