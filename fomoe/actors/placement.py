"""Where processes go on a Ray cluster, and the environment that Ray reads at import."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fomoe.actors.launch import Box, Site
from fomoe.errors import ClusterLostError, ConfigError

_PROBE_S, _PROBES = 1.0, 5
TOKEN_FILE = Path.home() / ".ray" / "auth_token"
_OWNED = "RAY_STARTED_BY_FOMOE"  # in the environment of a cluster that ends with its process


def prepare_environment() -> None:
    """Set what Ray must find in the environment before it is imported.

    Raises:
        ConfigError: variables say which GPUs are to be seen in a way that Ray refuses.
    """
    check_visible_devices()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # for a cluster that fomoe starts itself
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def check_visible_devices() -> None:
    """Refuse variables with which `import ray`, or the first actor, would fail.

    Raises:
        ConfigError: ROCR_VISIBLE_DEVICES stands alone; or HIP_VISIBLE_DEVICES and
            CUDA_VISIBLE_DEVICES, which HIP and some releases of Ray take for one thing, differ.
    """
    rocr, hip, cuda = (
        os.environ.get(f"{kind}_VISIBLE_DEVICES") for kind in ("ROCR", "HIP", "CUDA")
    )
    if rocr is not None and hip is None:
        raise ConfigError(
            f"ROCR_VISIBLE_DEVICES={rocr} is set without HIP_VISIBLE_DEVICES, which Ray "
            "refuses: unset it and set HIP_VISIBLE_DEVICES instead"
        )
    if hip is not None and cuda is not None and hip != cuda:
        raise ConfigError(
            f"HIP_VISIBLE_DEVICES={hip} and CUDA_VISIBLE_DEVICES={cuda} differ; HIP and some "
            "releases of Ray take them for one thing: unset one of them"
        )


def gpu_environment() -> dict[str, dict[str, str]]:
    """Return the runtime environment of actors that use a GPU without asking Ray for one.

    Ray would hide all GPUs from them; also on a cluster that others have started.
    """
    return {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}


@contextlib.contextmanager
def owned() -> Iterator[None]:
    """Mark the processes that start meanwhile as a cluster that nobody else may join."""
    os.environ[_OWNED] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_OWNED]


def uses_token() -> bool:
    """Whether this process's Ray calls carry a token."""
    return os.environ.get("RAY_AUTH_MODE") == "token"


def set_token_use(mode: str | None) -> None:
    """Make Ray calls of this process carry a token ("token") or not; None lets Ray decide."""
    if mode is None:
        os.environ.pop("RAY_AUTH_MODE", None)
    else:
        os.environ["RAY_AUTH_MODE"] = mode
    if "ray" in sys.modules:  # it looked once, when it was imported
        sys.modules["ray"]._raylet.Config.initialize("")


def token_use() -> str | None:
    """Return RAY_AUTH_MODE of this process."""
    return os.environ.get("RAY_AUTH_MODE")


@dataclass(frozen=True, slots=True)
class FoundCluster:
    """A cluster that has a node on this machine.

    Attributes:
        address: of its head.
        wants_token: whether it asks for a token.
        is_owned: whether a process of fomoe started it for itself, and ends it.
    """

    address: str
    wants_token: bool
    is_owned: bool


def find_cluster(address: str | None) -> FoundCluster | None:
    """Return the cluster at `address`, else at RAY_ADDRESS, else the one that runs here.

    Every node runs a raylet with the cluster's address in its arguments and Ray's authentication
    mode in its environment, which is how the mode is known before the first call. None where no
    raylet of that cluster runs on this machine; one that a fomoe started for itself must be named.
    """
    wanted = address or os.environ.get("RAY_ADDRESS")
    is_open = wanted in (None, "auto")
    for process in psutil.process_iter(["name"]):
        if process.info["name"] != "raylet":
            continue
        with contextlib.suppress(psutil.Error):
            found = _cluster_of(process)
            if (
                found is not None
                and (not found.is_owned if is_open else wanted == found.address)
                and answers(found.address)
            ):
                return found
    return None


def answers(address: str) -> bool:
    """Whether the cluster's head can be reached; a raylet outlives its head by seconds."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, ValueError):
        return False
    return True


def has_ended(address: str) -> bool:
    """Whether the cluster's head is not reached within some seconds; it may be busy, or restart."""
    for attempt in range(_PROBES):
        if attempt:
            time.sleep(_PROBE_S)
        if answers(address):
            return False
    return True


def _cluster_of(raylet: psutil.Process) -> FoundCluster | None:
    addresses = [a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--gcs-address=")]
    if not addresses or raylet.status() == psutil.STATUS_ZOMBIE:
        return None
    environment = raylet.environ()
    wants_token = environment.get("RAY_AUTH_MODE") == "token"
    return FoundCluster(addresses[0], wants_token, _OWNED in environment)


def protect_token() -> None:
    """Make the token file readable for its owner alone; Ray writes it with the shell's umask."""
    if TOKEN_FILE.is_file() and TOKEN_FILE.stat().st_mode & 0o077:
        TOKEN_FILE.chmod(0o600)


@dataclass(frozen=True, slots=True)
class RayNode:
    """One live node of a Ray cluster."""

    node_id: str
    host: str
    name: str


def plan_site(devices: tuple[str, ...], nodes: list[RayNode], here: str) -> tuple[Site, list[str]]:
    """Return the site of an engine and the node id of each box; the first box is this node.

    A device `cpu@NODE` goes to the node with that id (or its beginning), name or address; one
    without `@` stays here.

    Raises:
        ConfigError: a device names a node that the cluster does not have.
        ClusterLostError: this node is none of the cluster's any more.
    """
    by_id = {node.node_id: node for node in nodes}
    if here not in by_id:
        raise ClusterLostError(
            f"this node {here[:12]} is not among the {len(nodes)} nodes of the Ray cluster: it has "
            "ended; start fomoe again"
        )
    order, device_box = [here], []
    for device in devices:
        where = device.partition("@")[2]
        node_id = _find(where, nodes) if where else here
        if node_id not in order:
            order.append(node_id)
        device_box.append(order.index(node_id))
    # Sockets are for other boxes only; alone, nothing listens where others could call.
    hosts = ["127.0.0.1"] if len(order) == 1 else [by_id[node_id].host for node_id in order]
    boxes = tuple(Box(node_id, host) for node_id, host in zip(order, hosts, strict=True))
    return Site(boxes, tuple(device_box), len(os.sched_getaffinity(0))), order


def _find(where: str, nodes: list[RayNode]) -> str:
    found = [n for n in nodes if where in (n.node_id, n.host, n.name)]
    found = found or [n for n in nodes if n.node_id.startswith(where)]
    if len(found) != 1:
        known = ", ".join(f"{n.node_id[:12]} ({n.host})" for n in nodes)
        raise ConfigError(f"{where!r} names {len(found)} nodes of the cluster; there are {known}")
    return found[0].node_id


def live_nodes(records: list[dict[str, Any]]) -> list[RayNode]:
    """Return the live nodes of `ray.nodes()`."""
    return [
        RayNode(r["NodeID"], r["NodeManagerAddress"], r.get("NodeName") or r["NodeManagerHostname"])
        for r in records
        if r["Alive"]
    ]
