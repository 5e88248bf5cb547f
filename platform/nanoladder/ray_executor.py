"""Ray as a `concurrent.futures` executor: the same work as with processes, over all CPUs of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class RayExecutor(Executor):
    """Runs functions as Ray tasks of one CPU each; a node that dies loses nothing, Ray runs its tasks again.

    Ray must be connected (nanoladder.ray_init.ensure_ray), and functions and arguments must pickle.
    """

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._remote: dict[Any, Any] = {}

    @property
    def num_cpus(self) -> int:
        """CPUs of the whole cluster."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if fn not in self._remote:
            self._remote[fn] = self._ray.remote(num_cpus=1)(fn)
        return self._remote[fn].remote(*args, **kwargs).future()
