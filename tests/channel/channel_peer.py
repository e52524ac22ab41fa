"""The other process of the channel tests: `channel_peer.py ROLE JSON-ARGUMENTS`."""

import hashlib
import json
import os
import signal
import sys
import time

import numpy as np

from fomoe.actors.channel import Endpoint, Fabric, FabricSpec, Listener, connect, open_fabric
from fomoe.errors import PeerDeadError


def say(**message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def receive(fabric, receiver, buffer, spin_us=0):
    while True:
        bell = fabric.bell()
        message = receiver.try_recv(buffer)
        if message is not None:
            return message
        fabric.wait(bell, spin_us, 1000)


def serve_echo(fabric, frm):
    buffer = np.zeros(fabric.spec.slot_bytes, np.uint8)
    receiver, sender = fabric.receiver(frm), fabric.sender(frm)
    while True:
        tag, nbytes = receive(fabric, receiver, buffer)
        regions = ()
        if tag == 99:  # proves that the region's bytes were there when the message was
            states = fabric.arena("states")
            states[5000:5100] = states[100:200] + 1
            regions = (("states", 5000, 100),)
        sender.send(tag, buffer[:nbytes], regions, 5)


def echo(handle, me="b", frm="a"):
    with Fabric.attach(handle, me) as fabric:
        say(ready=fabric.fabric_id)
        try:
            serve_echo(fabric, frm)
        except PeerDeadError as error:
            say(dead=error.peer)


def flood(handle, count, seed):
    """Sends `count` messages of random sizes and says their checksum."""
    rng = np.random.default_rng(seed)
    digest = hashlib.blake2b()
    with Fabric.attach(handle, "b") as fabric:
        sender = fabric.sender("a")
        source = rng.integers(0, 256, fabric.spec.slot_bytes * 2, np.uint8)
        sizes = rng.integers(0, fabric.spec.slot_bytes + 1, count).tolist()
        for i, size in enumerate(sizes):
            payload = source[i % 97 : i % 97 + size]
            sender.send(i, payload, timeout_s=20)
            digest.update(payload)
        say(checksum=digest.hexdigest())
        sys.stdin.readline()


def create(spec, write):
    """Makes a fabric, writes into an arena and waits to be killed."""
    fabric = Fabric.create(FabricSpec.from_dict(spec), "a")
    fabric.arena("states")[:3] = write
    fabric.sender("b").send(7, b"last words")
    say(handle=fabric.handle())
    sys.stdin.readline()


def bystand(handle, me):
    """Attaches and does nothing."""
    with Fabric.attach(handle, me):
        say(ready=True)
        sys.stdin.readline()


def interrupted(handle):
    """Sleeps on the bell; SIGALRM's handler must run meanwhile."""
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    with Fabric.attach(handle, "b") as fabric:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        rung = fabric.wait(fabric.bell(), 0, 300)
        say(rung=rung, handled_s=seen[0] - start, slept_s=time.monotonic() - start)


def remote_echo(spec, me, box_id, transport, frm="a"):
    """Meets the other process through the handshake and echoes."""
    fabric = open_fabric(FabricSpec.from_dict(spec), me, box_id, (), transport)
    listener = Listener()
    mine = listener.endpoint(fabric, box_id)
    say(endpoint=mine.to_dict() | {"key": mine.key.hex()})
    records = json.loads(sys.stdin.readline())
    endpoints = [Endpoint.from_dict(r | {"key": bytes.fromhex(r["key"])}) for r in records]
    say(over=connect(fabric, listener, endpoints, transport))
    try:
        serve_echo(fabric, frm)
    except PeerDeadError as error:
        say(dead=error.peer)


ROLES = {f.__name__: f for f in (echo, flood, create, bystand, interrupted, remote_echo)}

if __name__ == "__main__":
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    ROLES[role](**arguments)
    os._exit(0)
