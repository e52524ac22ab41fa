"""Ray: finds or starts a cluster, wraps the plain actor classes, takes them down again."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

from fomoe.actors import placement
from fomoe.actors.driver import DriverActor
from fomoe.actors.gpu import GPUActor
from fomoe.actors.launch import Handle, RunningEngine, launch
from fomoe.actors.layers import LayerActor
from fomoe.actors.metrics import RayMetrics
from fomoe.actors.names import NAMESPACE
from fomoe.actors.storage import StorageActor
from fomoe.config import EngineConfig
from fomoe.errors import ClusterLostError, ConfigError, EngineError
from fomoe.gguf.reader import GGUFFile
from fomoe.model.spec import ModelSpec

_NAME_BOUND_S = 3.0
OBJECT_STORE_BYTES = 200_000_000  # control messages only; Ray's default takes a third of the RAM


class FomoeDriver(DriverActor):
    """The driver as a Ray actor; its totals also appear on Ray's metrics port."""

    exits_when_orphaned = True

    def start(self, arm: tuple[int, ...] = ()) -> None:
        """Begin to fill the tiers and then to serve."""
        super().start(arm)
        self._metrics = RayMetrics(self.stats)

    def __repr__(self) -> str:
        return self.name


class FomoeGPU(GPUActor):
    """A device as a Ray actor."""

    exits_when_orphaned = True

    def __repr__(self) -> str:
        return self.name


class FomoeLayers(LayerActor):
    """A GPU as a Ray actor; it asks Ray for no GPU, because Ray does not see all of them."""

    exits_when_orphaned = True

    def __repr__(self) -> str:
        return self.name


class FomoeStorage(StorageActor):
    """A node's storage as a Ray actor."""

    exits_when_orphaned = True

    def __repr__(self) -> str:
        return self.name


_CLASSES: dict[str, type] = {
    "driver": FomoeDriver, "gpu": FomoeGPU, "layers": FomoeLayers, "storage": FomoeStorage,
}  # fmt: skip


class RayHandle:
    """The owner's end of a Ray actor."""

    def __init__(self, ray: ModuleType, actor: Any) -> None:
        self._ray = ray
        self._actor = actor

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method of the actor."""
        future: Future[Any] = getattr(self._actor, method).remote(*args).future()
        return future

    def kill(self) -> None:
        """End the actor's process."""
        self._ray.kill(self._actor)


class Cluster:
    """A connection to a Ray cluster, started here where none was found.

    `address` None or "auto" looks for a running cluster first. A cluster that was there before is
    left as it was; one that was started here ends with `close`. `classes` are what each role runs,
    for those who put a faulty one in its place.
    """

    def __init__(self, address: str | None = None) -> None:
        placement.prepare_environment()
        self._mode_before = mode = placement.token_use()
        found = None if address == "local" else placement.find_cluster(address)
        if mode is None and found is not None:
            placement.set_token_use("token" if found.wants_token else "disabled")
        import ray

        self._ray = ray
        self.classes = dict(_CLASSES)
        self.is_local = False
        logging.getLogger("ray").setLevel(logging.WARNING)
        self._is_callers = ray.is_initialized()
        if self._is_callers:  # the caller's connection, and the caller's to close
            return
        options: dict[str, Any] = {
            "namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR,
        }  # fmt: skip
        if found is not None or address not in (None, "auto", "local"):
            self._connect(found.address if found is not None else str(address), options)
            return
        with placement.owned():
            self._init(
                address="local", object_store_memory=OBJECT_STORE_BYTES, include_dashboard=True,
                dashboard_host="127.0.0.1", **options,
            )  # fmt: skip
        placement.protect_token()
        self.is_local = True

    def _connect(self, address: str, options: dict[str, Any]) -> None:
        try:
            self._init(address=address, **options)
        except ConnectionError as error:
            raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error

    def _init(self, **options: Any) -> None:
        """Connect to a cluster, or start one.

        Raises:
            ConnectionError: none is there.
            EngineError: whatever else Ray, which has no errors of its own for this, complains of.
        """
        try:
            self._ray.init(**options)
        except ConnectionError:
            raise
        except Exception as error:
            raise EngineError(
                f"Ray did not start: {str(error).strip()}; its logs are in "
                "/tmp/ray/session_latest/logs"
            ) from error

    def launch(
        self, file: GGUFFile, spec: ModelSpec, config: EngineConfig, name: str,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> RunningEngine:  # fmt: skip
        """Start an engine whose actors are called `name-driver`, `name-gpu-0`, ...

        Raises:
            EngineError: an engine of that name runs on the cluster.
            ClusterLostError: the cluster has ended; its calls would wait for a minute and then end
                this process.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = self._ray
        context = ray.get_runtime_context()
        address, here = context.gcs_address, context.get_node_id()
        if placement.has_ended(address):
            raise ClusterLostError(f"the Ray cluster at {address} has ended; start fomoe again")
        nodes = placement.live_nodes(ray.nodes())
        site, node_ids = placement.plan_site(config.devices, nodes, here)

        on_gpus = {"layers", "driver"} if config.splits_layers else {"layers"}

        def spawn(role: str, process: str, box: int) -> Handle:
            strategy = NodeAffinitySchedulingStrategy(node_ids[box], soft=False)
            kind = ray.remote(self.classes[role])
            options = kind.options(
                name=f"{name}-{process}", namespace=NAMESPACE, num_cpus=0, max_restarts=0,
                max_task_retries=0, scheduling_strategy=strategy,
                runtime_env=placement.gpu_environment() if role in on_gpus else None,
            )  # fmt: skip
            return RayHandle(ray, _create(options, process))

        return launch(file, spec, config, site, spawn, on_progress)

    @property
    def has_token(self) -> bool:
        """Whether programs need a token on this cluster."""
        return placement.uses_token()

    def hints(self) -> list[str]:
        """Return lines for people: how to look at the actors, and what of the cluster hurts."""
        ray = self._ray
        prefix = "RAY_AUTH_MODE=token " if self.has_token else ""
        address = ray.get_runtime_context().gcs_address
        url = ray.worker.global_worker.node.address_info.get("webui_url") or None
        ray_command = Path(sys.executable).with_name("ray")
        lines = [f"{prefix}{ray_command} list actors --address {address}"]
        if url is not None:
            token = f"  (token: {placement.TOKEN_FILE})" if self.has_token else ""
            lines.append(f"dashboard http://{url}{token}")
        if not self.has_token:
            lines.append(
                "this cluster runs without a token: anyone who reaches its ports can run code; "
                "`ray get-auth-token --generate` and start it again with RAY_AUTH_MODE=token"
            )
        return lines

    def actor_names(self) -> list[str]:
        """Return the names of fomoe's actors on this cluster."""
        from ray.util import list_named_actors

        found = list_named_actors(all_namespaces=True)
        return sorted(a["name"] for a in found if a["namespace"] == NAMESPACE)

    def kill_actors(self) -> list[str]:
        """End all of fomoe's actors on this cluster; returns their names."""
        names = self.actor_names()
        for name in names:
            with contextlib.suppress(ValueError):
                self._ray.kill(self._ray.get_actor(name, namespace=NAMESPACE))
        return names

    def close(self) -> None:
        """Disconnect; ends the cluster where it was started here."""
        if not self._is_callers:
            self._ray.shutdown()
        placement.set_token_use(self._mode_before)


def _create(options: Any, process: str) -> Any:
    """Create a named actor; waits a moment for the name of one that is being ended."""
    deadline = time.monotonic() + _NAME_BOUND_S
    actor, error = _try_create(options, process)
    while actor is None and time.monotonic() < deadline:
        time.sleep(0.1)
        actor, error = _try_create(options, process)
    if actor is None:
        raise EngineError(
            f"fomoe runs on this cluster already: {error}; end it with fomoe stop"
        ) from error
    return actor


def _try_create(options: Any, process: str) -> tuple[Any, ValueError | None]:
    try:
        return options.remote(process), None
    except ValueError as error:  # Ray: the name is taken
        return None, error


def niceness_hint(nice: int) -> str | None:
    """Return the line to print where Ray gave our actors less than a normal share of the cores."""
    if nice <= 0 or os.geteuid() == 0:
        return None
    return (
        f"Ray runs its actors at nice {nice} here; start the cluster with\n"
        "  RAY_worker_niceness=0 ray start --head --object-store-memory=200000000 "
        "--disable-usage-stats"
    )
