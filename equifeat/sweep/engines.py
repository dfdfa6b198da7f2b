"""Where the fits of a sweep run: processes of this machine, tasks of a Ray cluster, SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from equifeat.errors import RecipeError, import_extra
from equifeat.ray_cluster import join_cluster

# A fit saves within one step after SIGTERM; then it is killed.
_STOP_SECONDS = 120.0


class Fit(NamedTuple):
    """One fit to run.

    Attributes:
        name: Name of its row and seed.
        arguments: Arguments behind ``equifeat fit``.
        log: File that its output is added to.
    """

    name: str
    arguments: list[str]
    log: Path


class Ended(NamedTuple):
    """A fit that ended.

    Attributes:
        name: Name of its row and seed.
        code: Exit code; negative for a signal.
        seconds: How long it ran in this turn.
    """

    name: str
    code: int
    seconds: float


def run_fit(fit: Fit, more: Mapping[str, str], running: list[Any] | None = None) -> Ended:
    """Run one fit to its end in a process of its own.

    Args:
        fit: The fit.
        more: Variables added to its environment.
        running: The process is in this list while it runs.

    Returns:
        How it ended.
    """
    started = time.monotonic()
    fit.log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "equifeat.cli", "fit", *fit.arguments]
    with fit.log.open("ab") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **more}
        )
        if running is not None:
            running.append(process)
        code = process.wait()
        if running is not None:
            running.remove(process)
    return Ended(fit.name, code, time.monotonic() - started)


def run_here(fits: Sequence[Fit], jobs: int, gpus: Sequence[str] = ()) -> Iterator[Ended]:
    """Run fits on this machine, several at a time.

    When this generator is closed, or the process is interrupted or terminated, running fits are
    asked to save and stop.

    Args:
        fits: The fits.
        jobs: How many at a time.
        gpus: Numbers of GPUs that they take turns on; all see all when empty.

    Yields:
        Fits as they end.

    Raises:
        RecipeError: jobs is below 1.
    """
    if jobs < 1:
        raise RecipeError(f"--jobs is {jobs}: use at least 1")
    free: Queue[str] = Queue()
    for number in range(jobs):
        free.put(gpus[number % len(gpus)] if gpus else "")
    more: dict[str, str] = {}
    if jobs > 1:
        # torch would start as many threads as there are cores in each of them
        more["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    running: list[subprocess.Popen[bytes]] = []

    def one(fit: Fit) -> Ended:
        gpu = free.get()
        try:
            chosen = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
            return run_fit(fit, {**more, **chosen}, running)
        finally:
            free.put(gpu)

    with _sigterm_ends(), ThreadPoolExecutor(jobs) as pool:
        left: set[Future[Ended]] = {pool.submit(one, fit) for fit in fits}
        try:
            while left:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _stop(running)


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that its fits are stopped and not left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(running: list[subprocess.Popen[bytes]]) -> None:
    """Ask fits to save and stop, and make sure that they do."""
    end = time.monotonic() + _STOP_SECONDS
    for process in list(running):
        process.send_signal(signal.SIGTERM)
    while running and time.monotonic() < end:
        time.sleep(0.1)
    for process in list(running):
        process.kill()


def run_on_ray(
    fits: Sequence[Fit], address: str | None, cpus: float, gpus: float
) -> Iterator[Ended]:
    """Run fits as tasks of a Ray cluster; its nodes see the same folders under the same paths.

    Args:
        fits: The fits.
        address: Of the cluster; the one that is found, or one of this machine, when left out.
        cpus: CPU cores of a fit.
        gpus: GPUs of a fit.

    Yields:
        Fits as they end; a fit whose node was lost is tried again, and resumes.

    Raises:
        RecipeError: No cluster answers at the address.
        MissingExtraError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_extra("ray", "ray", "--engine ray")
    ours = not ray.is_initialized()
    if ours:
        try:
            join_cluster(ray, address)
        except ConnectionError as error:
            raise RecipeError(f"--{error}") from error
    folder = Path.cwd()

    def one(fit: Fit) -> Ended:
        os.chdir(folder)
        return run_fit(fit, {})

    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=5, retry_exceptions=False)(one)
    left = {remote.remote(fit): fit for fit in fits}
    try:
        while left:
            done, _ = ray.wait(list(left), num_returns=1)
            for reference in done:
                fit = left.pop(reference)
                try:
                    yield Ended(*ray.get(reference))
                except ray.exceptions.RayError as error:
                    with fit.log.open("a", encoding="utf-8") as log:
                        log.write(f"Ray lost the fit: {error}\n")
                    yield Ended(fit.name, 1, 0.0)
    finally:
        for reference in left:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def queued(job: str) -> bool:
    """Return whether SLURM still has a job in its queue, waiting or running.

    Args:
        job: Its number.

    Returns:
        False when it ended, or when there is no SLURM here.
    """
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%i"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0 and bool(done.stdout.strip())
