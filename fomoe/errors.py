"""The exception tree; every message carries numbers and says what to do.

FomoeError
├── ConfigError            an option or a combination of options is wrong
│   └── BudgetError        a memory budget cannot hold what must be held
├── GGUFError              a model file is malformed, truncated or not supported
├── StorageError           expert bytes could not be read
├── TraceError             a trace file is foreign, damaged or cannot be written
├── RequestError           a client's request is refused; the server lives on
├── ChannelError           a message could not be delivered
│   ├── PeerDeadError      the process at the other end is gone
│   └── PeerStalledError   the process at the other end did not answer in time
├── DeviceError            a device is missing or failed
└── EngineError            a running engine failed; requests in flight end with this
    └── ClusterLostError   the Ray cluster under it has ended
"""

from __future__ import annotations

from pathlib import Path


class FomoeError(Exception):
    """Base of everything that fomoe raises on purpose."""


class ConfigError(FomoeError):
    """An option is unknown, out of range or clashes with another one."""


class BudgetError(ConfigError):
    """A memory budget is too small; the message names the number that would work."""

    def __init__(self, what: str, needed_bytes: int, given_bytes: int) -> None:
        super().__init__(
            f"{what}: {given_bytes:,} bytes given, at least {needed_bytes:,} bytes needed"
        )
        self.needed_bytes = needed_bytes
        self.given_bytes = given_bytes


class GGUFError(FomoeError):
    """A GGUF file is refused: names file, field and byte offset, and what to do about it."""

    def __init__(self, path: Path | str, field: str, offset: int, problem: str, hint: str) -> None:
        super().__init__(f"{path}: {field} at byte {offset:,}: {problem}; {hint}")
        self.path = Path(path)
        self.field = field
        self.offset = offset


class StorageError(FomoeError):
    """Bytes of an expert could not be read: names file, tensor and offset."""


class TraceError(FomoeError):
    """A trace file is refused or cannot be written: names the file and what to do about it."""

    def __init__(self, path: Path | str, problem: str, hint: str) -> None:
        super().__init__(path, problem, hint)  # what pickle makes a copy from
        self.path = Path(path)
        self._text = f"{path}: {problem}; {hint}"

    def __str__(self) -> str:
        return self._text


class RequestError(FomoeError):
    """A request is refused; `param` names the field, `status` is the HTTP status to send."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class ChannelError(FomoeError):
    """A message could not be sent or received."""


class PeerDeadError(ChannelError):
    """The process at the other end of a channel has died."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"{peer} has died; its requests end and it is started again")
        self.peer = peer


class PeerStalledError(ChannelError):
    """The process at the other end did not take or answer a message within the bound."""

    def __init__(self, peer: str, waited_s: float) -> None:
        super().__init__(f"{peer} did not answer within {waited_s:.1f} s")
        self.peer = peer
        self.waited_s = waited_s


class DeviceError(FomoeError):
    """A compute device is unknown, missing or failed."""


class EngineError(FomoeError):
    """The running engine failed; the request in flight ends with this message."""


class ClusterLostError(EngineError):
    """The Ray cluster has ended: starting actors again cannot help."""


class RequestCancelledError(EngineError):
    """Nobody waits for a request's answer any more; it ends where it is."""
