"""Applies a pure function to many points, on the cores of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, TypeVar

from fomoe.actors.cluster import Cluster
from fomoe.errors import EngineError

POINT_S = 600.0  # longest that one point may take once those before it are done
_AHEAD = 4  # tasks per core that are handed out before their turn

_Point = TypeVar("_Point")
_Result = TypeVar("_Result")


def map_points(
    function: Callable[[_Point], _Result], points: Sequence[_Point], *, address: str | None = None
) -> Iterator[_Result]:
    """Yield `function(point)` in the order of `points`, as `map` does, with all cores at work.

    Function, points and results are pickled; a file that a point names must lie on every node.

    Args:
        function: of a module that workers can import; depends on the point alone.
        points: any number.
        address: Ray cluster; None finds a running one or starts one for the time of the call.

    Raises:
        EngineError: a worker died, or a point took longer than ten minutes.
        Exception: what the function raised, of the first point in order that failed.
    """
    cluster = Cluster(address)
    try:
        yield from _mapped(function, points)
    finally:
        cluster.close()


def _mapped(function: Callable[[_Point], _Result], points: Sequence[_Point]) -> Iterator[_Result]:
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    ray: Any = import_module("ray")
    task = ray.remote(num_cpus=1, max_retries=1)(function)
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    ahead = _AHEAD * max(1, int(sum(nodes)))
    running = deque(task.remote(point) for point in points[:ahead])
    for following in range(ahead, ahead + len(points)):
        try:
            result: _Result = ray.get(running.popleft(), timeout=POINT_S)
        except RayTaskError as error:
            raise error.cause from None
        except GetTimeoutError:
            raise EngineError(
                f"a point took more than {POINT_S:.0f} s; take smaller ones, or fewer at a time"
            ) from None
        except RayError as error:
            raise EngineError(f"a worker was lost: {error}; run it again") from error
        if following < len(points):
            running.append(task.remote(points[following]))
        yield result
