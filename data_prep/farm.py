"""Many objects through workers: tries, limits and engines, whatever the work is.

A task function of a module turns a payload into a small dict. An engine runs it elsewhere; whatever
happens there costs one object. Nothing here knows about rendering.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from data_prep.farm_worker import GIB, Fault, Reply, guarded
from equifeat.errors import RenderError

EngineName = Literal["here", "local", "ray"]
TaskFunction = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class FarmOptions:
    """How the work is spread.

    Args:
        engine: "local" (processes of this machine), "ray" (a Ray cluster), or "here": in this
            process one after another, without limits and without protection from crashes.
        workers: Objects at once; None = 1 on this machine, every core of a Ray cluster.
        time_limit: Seconds an object may take, None for any.
        memory_limit: GiB that a worker may use, None for any.
        retries: Further tries after a fault that might pass.
        retry_failed: Whether to try objects again that failed in an earlier run.
        address: Of the Ray cluster; None = the one that is found, or a new one on this machine.
    """

    engine: EngineName = "here"
    workers: int | None = None
    time_limit: float | None = 900.0
    memory_limit: float | None = 8.0
    retries: int = 1
    retry_failed: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise RenderError(f"workers = {self.workers}: give at least 1")
        if self.time_limit is not None and not self.time_limit > 0:
            raise RenderError(f"time_limit = {self.time_limit}: give seconds above 0")
        if self.memory_limit is not None and not self.memory_limit >= 0.25:
            raise RenderError(
                f"memory_limit = {self.memory_limit}: give at least 0.25 GiB, a worker's own need"
            )
        if self.retries < 0:
            raise RenderError(f"retries = {self.retries}: give 0 or more")
        if self.address is not None and self.engine != "ray":
            raise RenderError(f"address = {self.address!r} needs --engine ray")

    @property
    def limits(self) -> Limits:
        """What every worker is held to."""
        memory = None if self.memory_limit is None else int(self.memory_limit * GIB)
        return Limits(self.time_limit, memory)


class Limits(NamedTuple):
    """What one object may use.

    Attributes:
        seconds: Time, None for any.
        memory: Bytes, None for any.
    """

    seconds: float | None
    memory: int | None


class Task(NamedTuple):
    """One object.

    Attributes:
        id: The object.
        payload: Argument of the task function.
    """

    id: str
    payload: Any


class Result(NamedTuple):
    """What became of an object after all tries.

    Attributes:
        task: The task.
        reply: The last try's.
        attempts: Number of tries.
    """

    task: Task
    reply: Reply
    attempts: int


@runtime_checkable
class Engine(Protocol):
    """Runs tasks somewhere."""

    def slots(self) -> int:
        """Return how many tasks can run at once now."""
        ...

    def submit(self, function: TaskFunction, task: Task) -> None:
        """Start a task.

        Args:
            function: A function of a module that the workers can import.
            task: What to do.
        """
        ...

    def wait(self) -> list[tuple[Task, Reply]]:
        """Wait until at least one task has ended.

        Returns:
            The tasks that ended.
        """
        ...

    def close(self) -> None:
        """Stop the workers, at once; a second call does nothing."""
        ...


class HereEngine:
    """Runs tasks in this process, one after another."""

    def __init__(self) -> None:
        self._left: deque[tuple[TaskFunction, Task]] = deque()

    def slots(self) -> int:
        """See `Engine`."""
        return 1

    def submit(self, function: TaskFunction, task: Task) -> None:
        """See `Engine`."""
        self._left.append((function, task))

    def wait(self) -> list[tuple[Task, Reply]]:
        """See `Engine`."""
        function, task = self._left.popleft()
        return [(task, guarded(function, task.payload))]

    def close(self) -> None:
        """See `Engine`."""


def open_engine(options: FarmOptions, gpus: bool = False) -> Engine:
    """Make an engine.

    Args:
        options: How the work is spread.
        gpus: Whether the work is better done on GPUs, where the cluster has them.

    Returns:
        The engine; close it after use.

    Raises:
        EquifeatError: Ray is not installed or does not answer.
    """
    if options.engine == "here":
        return HereEngine()
    if options.engine == "local":
        from data_prep.farm_local import LocalEngine

        return LocalEngine(options.workers or 1, options.limits)
    from data_prep.farm_ray import RayEngine

    return RayEngine(options.workers, options.limits, options.address, gpus)


def run_tasks(
    function: TaskFunction, tasks: Iterable[Task], engine: Engine, retries: int = 1
) -> Iterator[Result]:
    """Run every task, with a bounded number of them in the engine at a time.

    Args:
        function: A function of a module that the workers can import.
        tasks: What to do; drawn as workers become free.
        engine: Where.
        retries: Further tries after a fault that might pass.

    Yields:
        One result a task, in order of completion.

    Raises:
        RenderError: There is no room to write to: no object is to blame, so the run ends.
    """
    waiting = iter(tasks)
    tries: dict[str, int] = {}
    more = True
    while more or tries:
        while more and len(tries) < engine.slots():
            task = next(waiting, None)
            if task is None:
                more = False
                break
            tries[task.id] = 1
            engine.submit(function, task)
        if not tries:
            break
        for task, reply in engine.wait():
            fault = reply.fault
            if fault is not None and fault.kind == "storage":
                raise RenderError(
                    f"{task.id}: {fault.why}; make room and run the same command again"
                )
            if fault is not None and not fault.final and tries[task.id] <= retries:
                tries[task.id] += 1
                engine.submit(function, task)
                continue
            yield Result(task, reply, tries.pop(task.id))


def call_once(function: TaskFunction, payload: Any, engine: Engine) -> dict[str, Any]:
    """Call a function on one worker.

    Args:
        function: A function of a module that the workers can import.
        payload: Its argument.
        engine: Where.

    Returns:
        What the function returned.

    Raises:
        RenderError: It failed, twice if the fault might pass.
    """
    (result,) = run_tasks(function, [Task("the first worker", payload)], engine)
    if result.reply.value is None:
        fault = result.reply.fault or Fault("crash", "no answer")
        raise RenderError(fault.why)
    return result.reply.value
