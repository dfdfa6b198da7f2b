"""Work in background threads with a bound on what waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """A pool of threads for writing; whoever is too fast for it waits.

    NumPy's, zarr's and safetensors' writing releases the interpreter lock, so threads are enough.

    Args:
        threads: How many.
        limit: Most bytes that may wait; a single larger item is let in alone.
    """

    def __init__(self, threads: int, limit: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self._limit = limit
        self._waiting = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.most = 0
        """Most bytes that waited at any time."""

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error what waits is dropped, but what is being written is finished.
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._raise()

    def submit(self, size: int, work: Callable[[], None]) -> None:
        """Have something done, and wait while too much waits already.

        Args:
            size: Bytes that it holds until it is done.
            work: What to do.

        Raises:
            BaseException: What an earlier item raised.
        """
        with self._changed:
            while self._waiting and self._waiting + size > self._limit and self._error is None:
                self._changed.wait()
            self._raise()
            self._waiting += size
            self.most = max(self.most, self._waiting)
        self._pool.submit(work).add_done_callback(lambda done: self._finished(done, size))

    def _finished(self, done: Future[None], size: int) -> None:
        with self._changed:
            self._waiting -= size
            if not done.cancelled() and self._error is None:
                self._error = done.exception()
            self._changed.notify()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
