"""Inside a worker process: one thread, one GPU, a memory limit, and no life after its parent.

Nothing heavy is imported here: the environment variables below only work before NumPy is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_prep.farm_gpu import pin_worker
from equifeat.errors import EquifeatError, RenderError

FaultKind = Literal[
    "refused",
    "wrong picture",
    "time limit",
    "memory limit",
    "crash",
    "context lost",
    "unexpected",
    "storage",
]
GIB = 2**30
# Places on the board, memory that a worker shares with its parent.
PID, PEAK, OVER, BOARD_SIZE = 0, 1, 2, 3

# One core a worker: llvmpipe, OpenMP and the BLAS libraries would each take all of them.
_ONE_THREAD = (
    "LP_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_TICK = 0.1
_PR_SET_PDEATHSIG = 1
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# 0x507 is GL_CONTEXT_LOST, 0x300E EGL_CONTEXT_LOST.
_LOST = ("context_lost", "context lost", "contextlost", "err = 1287", "err = 12302")


class Fault(NamedTuple):
    """Why an object failed.

    Attributes:
        kind: What sort of fault.
        why: One sentence.
    """

    kind: FaultKind
    why: str

    @property
    def final(self) -> bool:
        """Whether another try would end alike."""
        return self.kind == "refused"


class Reply(NamedTuple):
    """What came of one try.

    Attributes:
        value: What the task function returned, None after a fault.
        fault: The fault, None when all went well.
        peak: Most bytes of memory that the worker used, 0 when not known.
    """

    value: dict[str, Any] | None
    fault: Fault | None
    peak: int = 0


def start_worker(board: Any, index: int, parent: int, limit: int | None) -> None:
    """Set up a fresh worker process.

    Args:
        board: Shared array of BOARD_SIZE integers.
        index: Number of the worker on its node.
        parent: Process that the worker must not outlive.
        limit: Most bytes of memory, None for any.
    """
    os.setsid()  # so that the worker and what it starts can be killed as one group
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in _ONE_THREAD:
        os.environ[name] = "1"
    pin_worker(index)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit is not None:
        # Against one huge request, which the watch below would see too late. Address space that
        # libraries reserve counts here, memory mapped from a GPU does not.
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        bound = 2 * limit + GIB
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    board[PID] = os.getpid()
    watch = threading.Thread(target=_watch, args=(board, parent, limit), daemon=True)
    watch.start()


def guarded(function: Callable[[Any], dict[str, Any]], payload: Any) -> Reply:
    """Call a task function and turn whatever it raises into a fault.

    Args:
        function: A function of a module.
        payload: Its argument.

    Returns:
        The reply, without the memory used.
    """
    try:
        return Reply(function(payload), None)
    except (Exception, SystemExit) as error:  # one object must not end a run of thousands
        return Reply(None, fault_of(error))


def fault_of(error: BaseException) -> Fault:
    """Say what sort of fault an exception is.

    Args:
        error: What the task function raised.

    Returns:
        The fault.
    """
    text = str(error)
    chain = _chain(error)
    if any(isinstance(e, MemoryError) for e in chain):
        return Fault("memory limit", text or "a request for memory was refused")
    if any(isinstance(e, OSError) and e.errno in _STORAGE for e in chain):
        return Fault("storage", text)
    lost = any(word in f"{type(e).__name__} {e}".lower() for e in chain for word in _LOST)
    if lost:
        return Fault("context lost", f"the OpenGL context was lost ({_one_line(error)})")
    if isinstance(error, RenderError):
        return Fault("wrong picture", text)
    if isinstance(error, EquifeatError):
        return Fault("refused", text)
    return Fault("unexpected", f"unexpected {_one_line(error)}")


def used_memory() -> int:
    """Return the bytes of private memory of this process and of those that it started.

    Pages of files, and those that a driver maps from a GPU, are not counted.
    """
    import psutil

    total = 0
    for pid in [os.getpid(), *_children(os.getpid())]:
        try:
            info = psutil.Process(pid).memory_info()
        except psutil.Error:
            continue
        total += info.rss - getattr(info, "shared", 0)
    return total


def used_cpu() -> float:
    """Return the core-seconds of this process so far and of those that it started and still has."""
    import psutil

    total = 0.0
    for pid in [os.getpid(), *_children(os.getpid())]:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def kill_group(pid: int) -> None:
    """Kill a worker and everything that it started.

    Args:
        pid: The worker, 0 for none.
    """
    if pid > 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    left = [pid]
    while left:
        # psutil would read every process of the machine for this
        for path in Path(f"/proc/{left.pop()}/task").glob("*/children"):
            try:
                new = [int(word) for word in path.read_text().split()]
            except OSError:
                continue
            found += new
            left += new
    return found


def _watch(board: Any, parent: int, limit: int | None) -> None:
    while True:
        used = used_memory()
        board[PEAK] = max(board[PEAK], used)
        if limit is not None and used > limit:
            board[OVER] = used
            _end()
        if os.getppid() != parent:
            _end()
        time.sleep(_TICK)


def _end() -> None:
    """Kill this process and what it started, also in sessions of their own."""
    for pid in _children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    kill_group(os.getpid())


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
