"""A kernel launch with its arguments stored as the driver wants them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

Dim = tuple[int, int, int]
Argument = Any  # a ctypes object; int stands for a device address


def _dim(size: int | Sequence[int]) -> Dim:
    x, y, z = (*(size if isinstance(size, Sequence) else (size,)), 1, 1)[:3]
    return int(x), int(y), int(z)


class Launch:
    """One kernel, its grid of groups, threads per group, shared bytes and arguments.

    `grid` and `group` are an int or up to three. `args` are ctypes objects, or ints for device
    addresses (stored as 8 bytes); `args[i].value` may be changed between launches, and a launch
    takes the values of its moment. A captured graph keeps those of its capture.

    `early` lets it start beside the launches before it on its stream, where the driver can, back to
    the last copy or launch that is not early. Its kernel reads nothing that one of those writes,
    and writes nothing, before it has called fm_wait_before; every group calls it, so that the end
    of a launch is the end of all launches before it.
    """

    __slots__ = ("_pointers", "args", "early", "function", "grid", "group", "parameters", "shared")

    def __init__(
        self,
        function: int,
        grid: int | Sequence[int],
        group: int | Sequence[int],
        shared: int,
        args: Sequence[Argument],
        early: bool = False,
    ) -> None:
        self.function = function
        self.grid = _dim(grid)
        self.group = _dim(group)
        self.shared = shared
        self.early = early
        self.args = [ctypes.c_uint64(a) if hasattr(a, "__index__") else a for a in args]
        self._pointers = (ctypes.c_void_p * max(len(self.args), 1))(
            *(ctypes.addressof(a) for a in self.args)
        )
        self.parameters = ctypes.addressof(self._pointers)
