"""An event simulation of decoding one token: every layer's jobs on devices, links and drives.

Jobs of a layer, in the order in which the engine issues them: attention and router on the layer's
home device; decisions; reads of what no tier holds, ahead of every guess; copies of what RAM holds,
then of what lands; the shared expert and the hits, then each arrival; the end waits for all.
Guesses (prefetches) are read as `guesses` says. The host's memory has no queue: a token takes at
least the time of what is read, copied and returned through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.sim.guesses import Guesses
from fomoe.sim.lanes import F64, Drives, Landing, Mask, Server
from fomoe.sim.loads import Loads
from fomoe.sim.machine import Machine
from fomoe.sim.schedule import Outcome, Schedule
from fomoe.sim.shapes import ModelShape

_ACTIVATION_BYTES = 4


@dataclass(slots=True)
class _Run:
    """The state of a simulation between jobs."""

    devices: list[Server]
    links: list[Server]
    outs: list[Server]
    cores: list[Server]
    drives: list[Drives]
    linked: F64
    returned: F64
    time: F64


def decode(
    machine: Machine, shape: ModelShape, loads: Loads, schedule: Schedule, *,
    context: int = 0, seed: int = 0,
) -> Outcome:  # fmt: skip
    """Simulate one token per lane; each begins with idle resources.

    Args:
        machine: what it runs on.
        shape: the model.
        loads: int16 [lanes, L, D]; D is the devices' number for the split by experts, else any.
        schedule: how.
        context: tokens whose keys and values attention reads.
        seed: of the draws of which misses were guessed.

    Raises:
        ConfigError: the loads have another number of layers than the model, or of owners than
            there are devices, or cores that do not compute are to.
    """
    if loads.device.shape[1] != shape.n_layers:
        raise ConfigError(f"loads of {loads.device.shape[1]} layers for {shape.n_layers} layers")
    if schedule.cpu_arm and not machine.host.cpu_rate:
        raise ConfigError(f"{machine.name}: no host.cpu_rate, so its cores cannot compute experts")
    return _Simulation(machine, shape, loads, schedule, context, seed).run()


class _Simulation:
    """One call of `decode`."""

    def __init__(self, machine: Machine, shape: ModelShape, loads: Loads, schedule: Schedule,
                 context: int, seed: int) -> None:  # fmt: skip
        lanes = len(loads.device)
        self.machine, self.shape, self.schedule = machine, shape, schedule
        self.device, self.soft = machine.device, machine.software
        n = machine.n_devices
        shared = [Server(lanes) for _ in range(machine.nodes)]
        self.owner = [d // machine.device.count for d in range(n)]  # the node of each device
        self.state = _Run(
            devices=[shared[self.owner[d]] if self.device.shares_cores else Server(lanes)
                     for d in range(n)],
            links=[Server(lanes) for _ in range(n)],
            outs=[Server(lanes) for _ in range(n)],
            cores=[Server(lanes) for _ in range(machine.nodes)],
            drives=[_drives(machine, lanes) for _ in range(machine.nodes)],
            linked=np.zeros(lanes), returned=np.zeros(lanes), time=np.zeros(lanes),
        )  # fmt: skip
        self.counts = [self._owned(part) for part in
                       (loads.device, loads.ram, loads.nvme, loads.demoted)]  # fmt: skip
        self.has_work = np.any([part.any(axis=0) for part in self.counts], axis=0)
        _, ram, nvme, _ = self.counts
        self.guesses = Guesses(nvme, ram, schedule, np.random.default_rng(seed))
        self.kv_s = shape.kv_bytes * context / shape.n_layers / self.device.dense_rate

    def _owned(self, part: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        """Give each activation to a device: [lanes, L, D]."""
        n = self.machine.n_devices
        if self.schedule.split == "experts":
            if part.shape[2] != n:
                raise ConfigError(f"loads of {part.shape[2]} owners for {n} devices")
            return part
        owned = np.zeros((*part.shape[:2], n), np.int16)
        layers = np.arange(part.shape[1])
        owned[:, layers, layers % n] = part.sum(axis=2)
        return owned

    def run(self) -> Outcome:
        """Go through the layers."""
        state = self.state
        routed: list[F64] = []
        for layer in range(self.shape.n_layers):
            home = layer % len(state.devices)
            if layer:
                state.time = state.time + self._handoff(home, (layer - 1) % len(state.devices))
            dense = float(self.shape.layer_bytes[layer]) / self.device.dense_rate + self.kv_s
            scored = state.devices[home].serve(state.time, dense)
            routed.append(scored + self.soft.layer_s)
            at_work = [d for d in range(len(state.devices)) if d == home or self.has_work[layer, d]]
            self._read_ahead(layer, routed)
            ends = [self._experts(layer, d, home, (scored, routed)) for d in at_work]
            state.time = np.maximum.reduce(ends)
        head = self.shape.head_bytes / self.device.dense_rate
        last = state.devices[(self.shape.n_layers - 1) % len(state.devices)]
        wall = last.serve(state.time, head) + self.soft.token_s
        return self._outcome(wall)

    def _handoff(self, home: int, before: int) -> float:
        """Seconds for the hidden state to go from the last layer's device to this one's."""
        if home == before:
            return 0.0
        if self.owner[home] != self.owner[before]:
            return self._message()
        return self.soft.handoff_s

    def _message(self) -> float:
        network = self.machine.network
        assert network is not None, "several nodes have one"
        return network.latency_s + self.shape.hidden * _ACTIVATION_BYTES / network.rate

    def _exchange(self, device: int, home: int) -> float:
        """Seconds for the hidden state to reach a device that is not the layer's home."""
        if device == home:
            return 0.0
        return self._message() if self.owner[device] != self.owner[home] else self.soft.handoff_s

    def _read_ahead(self, layer: int, routed: list[F64]) -> None:
        """Read guesses between the last router's word and this one's."""
        for target in self.guesses.targets(layer):
            nbytes = float(self.shape.expert_bytes[target])
            for d in self.has_work[target].nonzero()[0].tolist():
                drives = self.state.drives[self.owner[d]]
                window = routed[layer - 1], routed[layer]
                self.guesses.read((target, d), target - layer, drives, window, nbytes)

    def _experts(self, layer: int, d: int, home: int, began: tuple[F64, list[F64]]) -> F64:
        """Bring and compute what a device owns of a layer; returns when it has ended there."""
        scored, routed = began
        route = routed[-1]
        state, schedule = self.state, self.schedule
        hits, ram, nvme, demoted = (part[:, layer, d] for part in self.counts)
        nbytes = float(self.shape.expert_bytes[layer])
        compute = nbytes / self.device.expert_rate
        exchange = self._exchange(d, home)
        ready = route + exchange
        shared = float(self.shape.shared_bytes[layer]) / self.device.dense_rate
        if not schedule.overlap:
            return self._in_turn(d, home, ready, (hits, ram, nvme), (shared, compute, nbytes))
        if self.device.link_rate:
            back = demoted.astype(np.float64) * nbytes
            state.returned += back
            state.outs[d].serve(route, back / self.device.link_rate)
        server = state.devices[d]
        ended = server.serve(scored if d == home else ready, shared if d == home else 0.0)
        ended = np.maximum(ended, server.serve(ready, hits.astype(np.float64) * compute))
        told = route + (self._message() if self.owner[d] != self.owner[home] else 0.0)
        arrivals = self._arrivals(layer, d, told, routed)
        ended = self._compute_late(server, (ready, ended), arrivals, compute)
        if schedule.cpu_arm:
            pace = nbytes / self.machine.host.cpu_rate
            ended = np.maximum(
                ended, state.cores[self.owner[d]].serve(ready, ram.astype(np.float64) * pace)
            )
        return np.asarray(np.where((hits + ram + nvme > 0) | (d == home), ended + exchange, ready))

    def _compute_late(
        self, server: Server, times: tuple[F64, F64], arrivals: list[Landing], compute: float
    ) -> F64:
        """Compute what came late, each as it lands or all with the last; returns the end."""
        ready, ended = times
        if self.schedule.together:
            last = np.maximum.reduce([ready, *(np.where(a.which, a.at, 0) for a in arrivals)])
            many = sum((a.which.astype(float) for a in arrivals), np.zeros(len(ready)))
            return np.maximum(ended, server.serve(last, many * compute))
        for each in arrivals:
            end = server.serve(np.maximum(each.at, ready), compute, each.which)
            ended = np.where(each.which, np.maximum(ended, end), ended)
        return ended

    def _arrivals(self, layer: int, d: int, route: F64, routed: list[F64]) -> list[Landing]:
        """Read and copy; returns when each arrival is on the device, and in which lanes.

        `route` is when the device's node knows what the router chose.
        """
        _, ram, nvme, _ = (part[:, layer, d] for part in self.counts)
        nbytes, ahead = float(self.shape.expert_bytes[layer]), self.guesses.landings(layer, d)
        drives = self.state.drives[self.owner[d]]
        link, late = self.device.link_rate, self.soft.reads_s
        copy = nbytes / link if link else 0.0
        # Pieces are copied while others are read, none before it has landed.
        later = 1 - 1 / self.schedule.pieces
        lead = later * min(copy, drives.least_s(nbytes, self.schedule.pieces))
        here = np.zeros(len(route))
        for guess in ahead:
            here += guess.which
        landings = [Landing(guess.at + late, guess.which) for guess in ahead]
        for number in range(int(nvme.max(initial=0))):
            which = (number < nvme) & (number >= here)
            end = drives.read(route, nbytes, self.schedule.pieces, which)
            landings.append(Landing(end + late, which))
        arrivals = []

        def bring(each: Landing, sooner: float) -> None:
            at = self._copy(d, each.at - sooner, copy, each.which, nbytes)
            arrivals.append(Landing(at, each.which))

        for guess in landings[: len(ahead)]:  # the link takes what is ready first
            bring(Landing(guess.at, guess.which & (guess.at <= route)), lead)
        for number in range(0 if self.schedule.cpu_arm else int(ram.max(initial=0))):
            asked = route
            if layer and self.schedule.overlap:  # a guess needs no drive, so it may go at once
                asked = np.where(number < self.guesses.ram[:, layer, d], routed[-2], route)
            bring(Landing(asked, number < ram), 0.0)
        for number, each in enumerate(landings):
            after = each.which & (each.at > route) if number < len(ahead) else each.which
            bring(Landing(each.at, after), lead)
        return arrivals

    def _copy(self, d: int, ready: F64, seconds: float, which: Mask, nbytes: float) -> F64:
        """Copy an expert of which the first piece is ready; returns when all of it is there."""
        if seconds == 0:
            return ready
        self.state.linked += which * nbytes
        return self.state.links[d].serve(ready, seconds, which)

    def _in_turn(
        self, d: int, home: int, ready: F64, wants: tuple[npt.NDArray[np.int16], ...],
        costs: tuple[float, float, float],
    ) -> F64:  # fmt: skip
        """One job after the other: all reads, all copies, all arithmetic."""
        hits, ram, nvme = wants
        shared, compute, nbytes = costs
        state, time = self.state, ready
        for number in range(int(nvme.max(initial=0))):
            which = number < nvme
            time = state.drives[self.owner[d]].read(time, nbytes, self.schedule.pieces, which)
        time = time + (nvme > 0) * self.soft.reads_s
        copy = nbytes / self.device.link_rate if self.device.link_rate else 0.0
        for number in range(int((ram + nvme).max(initial=0))):
            which = number < ram + nvme
            time = self._copy(d, time, copy, which, nbytes)
        work = (hits + ram + nvme).astype(np.float64) * compute + (shared if d == home else 0.0)
        return state.devices[d].serve(time, work) + self._exchange(d, home)

    def _outcome(self, wall: F64) -> Outcome:
        state = self.state
        distinct = list({id(server): server for server in state.devices}.values())
        busy = {
            "device": _mean(distinct), "link": _mean(state.links), "link back": _mean(state.outs),
            "processor": _mean(state.cores),
            "drive": np.mean([drives.share for drives in state.drives], axis=0),
        }  # fmt: skip
        read = np.sum([drives.bytes for drives in state.drives], axis=0)
        host = self.machine.host
        moved = read + state.linked + state.returned
        busy["memory"] = moved / self.machine.nodes / host.memory_rate
        return Outcome(wall=np.maximum(wall, busy["memory"]), busy=busy, read_bytes=read,
                       wasted_bytes=self.guesses.wasted, link_bytes=state.linked)  # fmt: skip


def _mean(servers: list[Server]) -> F64:
    return np.asarray(np.mean([server.busy for server in servers], axis=0))


def _drives(machine: Machine, lanes: int) -> Drives:
    return Drives(lanes, [d for d in machine.drives for _ in range(d.count)])
