"""Which box a device goes to, and what Ray's environment must say before it is imported."""

import os
import socket
from types import SimpleNamespace

import pytest

from fomoe.actors import placement
from fomoe.actors.cluster import Cluster
from fomoe.actors.placement import RayNode, live_nodes, plan_site
from fomoe.errors import ClusterLostError, ConfigError, EngineError

NODES = [
    RayNode("aa11" * 14, "10.0.0.1", "desk"),
    RayNode("bb22" * 14, "10.0.0.2", "attic"),
    RayNode("bb33" * 14, "10.0.0.3", "cellar"),
]
HERE = NODES[0].node_id


def test_devices_without_a_node_stay_here():
    site, order = plan_site(("cpu", "cpu"), NODES, HERE)
    assert site.device_box == (0, 0)
    # Alone, nothing listens where others could call.
    assert [(b.name, b.host) for b in site.boxes] == [(HERE, "127.0.0.1")]
    assert order == [HERE]
    assert site.cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("where", ["attic", "10.0.0.2", NODES[1].node_id, "bb22"])
def test_a_device_goes_to_the_node_it_names(where):
    site, order = plan_site((f"cpu@{where}",), NODES, HERE)
    # The driver's box is always there, with no device where none is wanted.
    assert [b.name for b in site.boxes] == order == [HERE, NODES[1].node_id]
    assert site.device_box == (1,)


def test_boxes_are_numbered_in_order_of_use_and_not_twice():
    names = ("cpu@cellar", "cpu", "cpu@10.0.0.2", "cpu@bb33", f"cpu:1@{HERE}")
    site, order = plan_site(names, NODES, HERE)
    assert order == [HERE, NODES[2].node_id, NODES[1].node_id]
    assert site.device_box == (1, 0, 2, 1, 0)
    assert [b.host for b in site.boxes] == ["10.0.0.1", "10.0.0.3", "10.0.0.2"]


@pytest.mark.parametrize(("where", "count"), [("garage", 0), ("bb", 2)])
def test_a_node_that_is_not_one_is_refused_with_the_choices(where, count):
    with pytest.raises(ConfigError, match=f"names {count} nodes") as refusal:
        plan_site((f"cpu@{where}",), NODES, HERE)
    assert all(node.host in str(refusal.value) for node in NODES)


def test_an_exact_name_beats_the_beginning_of_an_id():
    nodes = [*NODES, RayNode("cc" * 28, "10.0.0.4", "bb22")]
    _, order = plan_site(("cpu@bb22",), nodes, HERE)
    assert order == [HERE, "cc" * 28]


def test_this_node_must_be_in_the_cluster():
    with pytest.raises(ClusterLostError, match=r"3 nodes .* start fomoe again"):
        plan_site(("cpu",), NODES, "dd" * 28)


def test_dead_nodes_are_left_out():
    records = [
        {"NodeID": "a", "NodeManagerAddress": "h1", "NodeManagerHostname": "n1", "Alive": True},
        {"NodeID": "b", "NodeManagerAddress": "h2", "NodeManagerHostname": "n2", "Alive": False},
        {"NodeID": "c", "NodeManagerAddress": "h3", "NodeManagerHostname": "n3", "Alive": True,
         "NodeName": "given"},
    ]  # fmt: skip
    assert live_nodes(records) == [RayNode("a", "h1", "n1"), RayNode("c", "h3", "given")]


class TestEnvironment:
    def test_rocr_alone_is_refused_before_ray_would_crash(self, monkeypatch):
        monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
        monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
        with pytest.raises(ConfigError, match="ROCR_VISIBLE_DEVICES=1"):
            placement.prepare_environment()

    @pytest.mark.parametrize(("hip", "cuda"), [("0", "1"), ("0,1", "")])
    def test_variables_that_say_different_things_are_refused(self, monkeypatch, hip, cuda):
        monkeypatch.delenv("ROCR_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", hip)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hip)
        placement.check_visible_devices()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cuda)
        with pytest.raises(ConfigError, match=f"HIP_VISIBLE_DEVICES={hip} and .*={cuda} differ"):
            placement.prepare_environment()

    def test_what_the_user_set_stays(self, monkeypatch):
        monkeypatch.delenv("ROCR_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("RAY_worker_niceness", "7")
        for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
                     "RAY_DEDUP_LOGS"):  # fmt: skip
            monkeypatch.setenv(name, "x")  # restored afterwards
            monkeypatch.delenv(name)
        placement.prepare_environment()
        assert dict(os.environ).get("RAY_worker_niceness") == "7"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

    def test_a_readable_token_file_is_closed_to_others(self, monkeypatch, tmp_path):
        token = tmp_path / "auth_token"
        monkeypatch.setattr(placement, "TOKEN_FILE", token)
        placement.protect_token()
        assert not token.exists()
        token.write_text("secret")
        token.chmod(0o644)
        placement.protect_token()
        assert token.stat().st_mode & 0o777 == 0o600


class Raylet:
    """What psutil says of a raylet."""

    def __init__(self, address, **environment):
        self.info = {"name": "raylet"}
        self._address, self._environment = address, environment

    def cmdline(self):
        return ["raylet", f"--gcs-address={self._address}"]

    def status(self):
        return "sleeping"

    def environ(self):
        return self._environment


def test_a_cluster_that_a_process_started_for_itself_must_be_named(monkeypatch):
    with placement.owned():
        marked = {name: value for name, value in os.environ.items() if "FOMOE" in name}
    assert marked
    assert not marked.keys() & os.environ.keys()
    others = Raylet("10.0.0.1:2", RAY_AUTH_MODE="token")
    raylets = [Raylet("10.0.0.1:1", **marked), others]
    monkeypatch.setattr(placement.psutil, "process_iter", lambda names: iter(raylets))
    monkeypatch.setattr(placement, "answers", lambda address: True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for asked in (None, "auto"):
        found = placement.find_cluster(asked)
        assert (found.address, found.wants_token) == ("10.0.0.1:2", True)
    assert placement.find_cluster("10.0.0.1:1").is_owned
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")
    assert placement.find_cluster(None).address == "10.0.0.1:1"
    monkeypatch.delenv("RAY_ADDRESS")
    raylets.remove(others)
    assert placement.find_cluster(None) is None
    assert placement.find_cluster("auto") is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_head_that_is_back_after_a_while_has_not_ended(monkeypatch, host):
    monkeypatch.setattr(placement, "_PROBE_S", 0.02)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as gone:
        port = gone.getsockname()[1]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert placement.has_ended(address)
    back, sleeps = [], []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 2:
            back.append(socket.create_server((host, port), family=family))

    monkeypatch.setattr(placement.time, "sleep", sleep)
    assert not placement.has_ended(address)
    assert len(sleeps) == 2
    back[0].close()


def test_what_ray_complains_of_is_one_line():
    def refuse(**options):
        raise RuntimeError("Version mismatch: the cluster was started with 2.1")

    cluster = object.__new__(Cluster)
    cluster._ray = SimpleNamespace(init=refuse)
    with pytest.raises(EngineError, match="Ray did not start: Version mismatch"):
        cluster._init(address="local")
