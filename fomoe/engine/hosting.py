"""Which layers each device hosts, and what that leaves for experts; pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.config import EngineConfig
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile
from fomoe.model.gpu.options import HostOptions
from fomoe.model.spec import ModelSpec

STAGING_BYTES = 256 << 20
_LEAST_STAGED, _MOST_STAGED = 4, 128


def n_states(config: EngineConfig) -> int:
    """Return how many sequences' states devices hold: shadow steps take a second one."""
    routing = config.routing
    return 2 if routing.shadow_every or routing.quality.kind == "kl" else 1


def host_options(config: EngineConfig, spec: ModelSpec) -> tuple[HostOptions, ...]:
    """Return what each device hosts; layer l lives on device l mod n.

    The embedding is beside the first layer, the head beside the last. Equal in every process.
    """
    n = len(config.devices)
    last = (spec.n_layers - 1) % n
    return tuple(
        HostOptions(
            layers=tuple(range(device, spec.n_layers, n)),
            ctx_size=config.ctx_size,
            kv_dtype=config.kv_dtype,
            int8=config.activations == "int8",
            max_tokens=config.prefill_chunk,
            n_states=n_states(config),
            embedding=device == 0,
            head=device == last,
        )
        for device in range(n)
    )


def dense_bytes(file: GGUFFile, spec: ModelSpec, config: EngineConfig) -> tuple[int, ...]:
    """Return the bytes that each device needs before any expert; none where none hosts layers."""
    if not config.hosts_layers:
        return ()
    return tuple(planned_bytes(file, spec, each) for each in host_options(config, spec))


def planned_bytes(file: GGUFFile, spec: ModelSpec, options: HostOptions) -> int:
    """Return what a device needs for weights, states and work; no device is asked."""
    from fomoe.model.gpu import planning  # kernels' builders, which CPU machines can spare

    return planning.planned_bytes(file, spec, options)


@dataclass(frozen=True, slots=True)
class Staging:
    """Slots of shared memory through which experts come onto devices; all have one size."""

    n_slots: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.n_slots * self.slot_bytes


def staging(table: ExpertTable) -> Staging:
    """Return enough slots to keep a drive and a link busy, whatever the size of the model."""
    slot_bytes = max(c.slot_bytes for c in table.classes)
    return Staging(max(_LEAST_STAGED, min(_MOST_STAGED, STAGING_BYTES // slot_bytes)), slot_bytes)
