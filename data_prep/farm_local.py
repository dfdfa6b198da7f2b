"""The engine of one machine: pebble's process pools, one of a single process for each worker.

One pool a worker, so that a worker has a number (its GPU) and its death concerns nobody else.
"""

from __future__ import annotations

import os
import queue
import signal
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from data_prep.farm import Limits, Task, TaskFunction
from data_prep.farm_worker import (
    BOARD_SIZE,
    GIB,
    OVER,
    PEAK,
    PID,
    Fault,
    Reply,
    guarded,
    kill_group,
    start_worker,
)
from equifeat.errors import MissingExtraError


class LocalWorker:
    """A process that runs one task at a time and is made anew after a fault.

    Args:
        index: Its number on this machine.
        limits: What one object may use.
    """

    def __init__(self, index: int, limits: Limits) -> None:
        self._index = index
        self._limits = limits
        self._pool: Any = None
        # spawn: a forked GL context does not work
        self._context = get_context("spawn")
        self._board: Any = None

    def run(self, function: TaskFunction, payload: Any) -> Reply:
        """Run a task and wait for it.

        Args:
            function: A function of a module.
            payload: Its argument.

        Returns:
            The reply; whatever became of the process is in it.
        """
        from pebble import ProcessExpired

        try:
            pool = self._open()
            self._board[PEAK] = 0
            future = pool.schedule(guarded, (function, payload), timeout=self._limits.seconds)
            reply: Reply = future.result()
        except FutureTimeout:
            seconds = self._limits.seconds
            reply = Reply(None, Fault("time limit", f"not done after {seconds:g} s (--time_limit)"))
        except ProcessExpired as error:
            reply = Reply(None, self._death(error.exitcode))
        except CancelledError:
            reply = Reply(None, Fault("crash", "the run was ended"))
        except (BrokenProcessPool, RuntimeError, OSError) as error:
            reply = Reply(None, Fault("crash", f"no worker process could be had ({error})"))
        reply = reply._replace(peak=int(self._board[PEAK]) if self._board else 0)
        if reply.fault is not None and reply.fault.kind == "memory limit":
            reply = reply._replace(fault=self._over(reply.fault.why, reply.peak))
        if reply.fault is not None and not reply.fault.final:
            # whatever state it is in, the next object gets a fresh process and GL context
            self.close()
        return reply

    def close(self) -> None:
        """Kill the process and what it started."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        kill_group(int(self._board[PID]))
        self._board[PID] = 0
        pool.stop()
        pool.join()

    def _open(self) -> Any:
        if self._pool is None:
            try:
                from pebble import ProcessPool
            except ImportError as error:
                raise MissingExtraError("pebble", "render", "--engine local") from error
            self._board = self._context.RawArray("q", BOARD_SIZE)
            start = (self._board, self._index, os.getpid(), self._limits.memory)
            self._pool = ProcessPool(1, 0, start_worker, start, self._context)
        return self._pool

    def _death(self, code: int) -> Fault:
        if self._board[OVER]:
            return self._over("", int(self._board[OVER]))
        try:
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        except ValueError:
            cause = f"signal {-code}"
        peak = self._board[PEAK]  # 0 when it died at once
        used = f" with {peak / GIB:.2f} GiB in use" if peak else ""
        hint = ""
        if code == -signal.SIGKILL:
            hint = "; if the machine is out of memory, give fewer --workers"
        return Fault("crash", f"its worker process died ({cause}){used}{hint}")

    def _over(self, why: str, used: int) -> Fault:
        limit = (self._limits.memory or 0) / GIB
        refused = f", more was refused ({why})" if why else ""
        return Fault(
            "memory limit",
            f"over the memory limit of {limit:g} GiB, {used / GIB:.2f} GiB in use{refused}; "
            "give a larger --memory_limit with --retry_failed",
        )


class LocalEngine:
    """See `data_prep.farm.Engine`.

    Args:
        workers: Number of processes.
        limits: What one object may use.
    """

    def __init__(self, workers: int, limits: Limits) -> None:
        self._all = [LocalWorker(i, limits) for i in range(workers)]
        self._idle: queue.SimpleQueue[LocalWorker] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="farm")
        self._running: dict[Future[Reply], Task] = {}

    def slots(self) -> int:
        """See `data_prep.farm.Engine`."""
        return len(self._all)

    def submit(self, function: TaskFunction, task: Task) -> None:
        """See `data_prep.farm.Engine`."""
        self._running[self._threads.submit(self._run, function, task)] = task

    def wait(self) -> list[tuple[Task, Reply]]:
        """See `data_prep.farm.Engine`."""
        done, _ = wait_for(self._running, return_when=FIRST_COMPLETED)
        return [(self._running.pop(future), future.result()) for future in done]

    def close(self) -> None:
        """See `data_prep.farm.Engine`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.close()
        self._threads.shutdown()

    def _run(self, function: TaskFunction, task: Task) -> Reply:
        worker = self._idle.get()
        try:
            return worker.run(function, task.payload)
        finally:
            self._idle.put(worker)
