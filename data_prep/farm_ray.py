"""The engine of a cluster: Ray places the tasks, a worker process of ours on each node does them.

The object runs in a child process of the Ray worker, the same as on one machine, so that limits,
crashes and GPUs behave alike. Ray only has to cope with nodes that go.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from data_prep.farm import Limits, Task, TaskFunction
from data_prep.farm_local import LocalWorker
from data_prep.farm_worker import Fault, Reply
from equifeat.errors import MissingExtraError, RenderError
from equifeat.ray_cluster import join_cluster

# Of Ray's own: for nodes that go, not for objects that fail.
_NODE_RETRIES = 5
_OBJECT_STORE = 100 * 2**20

_workers: dict[tuple[Limits, str | None], LocalWorker] = {}


def run_on_node(function: TaskFunction, payload: Any, limits: Limits) -> Reply:
    """Run a task in a child process of this Ray worker; the child is kept for the next task.

    Args:
        function: A function of a module.
        payload: Its argument.
        limits: What one object may use.

    Returns:
        The reply.
    """
    # Ray changes CUDA_VISIBLE_DEVICES from task to task, an open GL context stays on its GPU
    key = (limits, os.environ.get("CUDA_VISIBLE_DEVICES"))
    for other in [k for k in _workers if k != key]:
        _workers.pop(other).close()
    if key not in _workers:
        _workers[key] = LocalWorker(0, limits)
    return _workers[key].run(function, payload)


class RayEngine:
    """See `data_prep.farm.Engine`.

    Args:
        workers: Most tasks at once, None for as many as the cluster has cores.
        limits: What one object may use.
        address: Of the cluster; None = the one that is found, or a new one on this machine.
        gpus: Whether to place tasks on nodes with GPUs only, where the cluster has any.
    """

    def __init__(
        self, workers: int | None, limits: Limits, address: str | None, gpus: bool
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray otherwise hides the GPUs from tasks that ask for none, and warns that it will stop
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray", "--engine ray") from error
        self._ray: Any = ray
        self._workers = workers
        self._limits = limits
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                join_cluster(ray, address, num_cpus=workers, object_store_memory=_OBJECT_STORE)
            except ConnectionError as error:
                raise RenderError(str(error)) from error
        total = self._ray.cluster_resources()
        cores = max(1.0, total.get("CPU", 1.0))
        slots = min(cores, workers or cores)
        share = int(10_000 * total.get("GPU", 0.0) / slots) / 10_000 if gpus else 0.0
        remote = ray.remote(
            num_cpus=1, num_gpus=min(share, 1.0), max_retries=_NODE_RETRIES, retry_exceptions=False
        )
        self._remote: Callable[..., Any] = remote(run_on_node).remote
        self._running: dict[Any, Task] = {}

    def slots(self) -> int:
        """See `data_prep.farm.Engine`; it follows nodes that come and go."""
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        return max(1, cores if self._workers is None else min(cores, self._workers))

    def submit(self, function: TaskFunction, task: Task) -> None:
        """See `data_prep.farm.Engine`."""
        self._running[self._remote(function, task.payload, self._limits)] = task

    def wait(self) -> list[tuple[Task, Reply]]:
        """See `data_prep.farm.Engine`."""
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        ended = []
        for reference in done:
            task = self._running.pop(reference)
            try:
                reply: Reply = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                why = " ".join(str(error).split())[:300]
                fault = Fault("crash", f"Ray lost the task ({type(error).__name__}: {why})")
                reply = Reply(None, fault)
            ended.append((task, reply))
        return ended

    def close(self) -> None:
        """See `data_prep.farm.Engine`."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._ours:
            self._ours = False
            self._ray.shutdown()
