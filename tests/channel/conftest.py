import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fomoe.actors.channel import FabricSpec, Listener, connect, open_fabric

SCRIPT = Path(__file__).with_name("channel_peer.py")


class Peer:
    """A process that runs one role of channel_peer.py; it talks by lines of JSON."""

    def __init__(self, role, **arguments):
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), role, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.pid = self.process.pid

    def tell(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self):
        line = self.process.stdout.readline()
        assert line, f"the peer ended with {self.process.wait(5)}"
        return json.loads(line)

    def kill(self):
        self.process.kill()

    def close(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def spawn():
    peers = []

    def start(role, **arguments):
        peers.append(Peer(role, **arguments))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


@pytest.fixture
def pair():
    """A spec of two processes with a ring each way."""

    def make(**numbers):
        return FabricSpec(
            ("a", "b"), (("a", "b"), ("b", "a")), (("states", 10_000), ("routes", 4096)), **numbers
        )

    return make


@pytest.fixture
def link():
    """Makes fabrics in this process, by box, and connects their processes with each other."""
    made = []

    def make(spec, boxes, transport="tcp", timeout_s=10):
        fabrics, endpoints, listeners = {}, [], {}
        for box, names in boxes.items():
            for name in names:
                offers = [end for end in endpoints if end.box_id == box]
                fabrics[name] = open_fabric(spec, name, box, offers, transport)
                made.append(fabrics[name])
                listeners[name] = Listener()
                endpoints.append(listeners[name].endpoint(fabrics[name], box))
        with ThreadPoolExecutor(len(fabrics)) as pool:
            calls = {
                name: pool.submit(connect, fabric, listeners[name], endpoints, transport, timeout_s)
                for name, fabric in fabrics.items()
            }
        return fabrics, {name: call.result() for name, call in calls.items()}

    yield make
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda fabric: fabric.close(), made))
