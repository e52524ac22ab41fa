"""The data plane: messages between the processes of an engine, without Ray in the loop."""

from fomoe.actors.channel._channel import load_acquire_u64, store_release_u64
from fomoe.actors.channel.fabric import Fabric
from fomoe.actors.channel.handshake import (
    Endpoint,
    Listener,
    Transport,
    connect,
    may_attach,
    open_fabric,
)
from fomoe.actors.channel.ports import Receiver, Regions, Sender
from fomoe.actors.channel.spec import FabricHandle, FabricSpec

__all__ = [
    "Endpoint",
    "Fabric",
    "FabricHandle",
    "FabricSpec",
    "Listener",
    "Receiver",
    "Regions",
    "Sender",
    "Transport",
    "connect",
    "load_acquire_u64",
    "may_attach",
    "open_fabric",
    "store_release_u64",
]
