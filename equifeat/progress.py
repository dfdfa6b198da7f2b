"""Progress of long jobs: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def progress(
    items: Iterable[T], what: str, total: int | None = None, seconds: float = 10.0
) -> Iterator[T]:
    """Iterate and show how far it is, on standard error.

    Args:
        items: What to iterate over.
        what: A few words that name the work.
        total: Number of items, when ``items`` has no length.
        seconds: Least time between two plain lines.

    Yields:
        The items.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= seconds or done == total:
            last = now
            of = f"/{total}" if total else ""
            rate = done / max(now - start, 1e-9)
            sys.stderr.write(f"{what}: {done}{of} in {now - start:.0f} s, {rate:.1f}/s\n")
            sys.stderr.flush()
