"""Milliseconds of a draw, plain and augmented, on the threads that OMP_NUM_THREADS gives."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli

from data_prep.procedural import write_procedural
from data_prep.render import RenderOptions, render_object
from equifeat.data.augment import Augment
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views


def bench(draws: int = 30, size: int = 512) -> None:
    """Render one object and time draws from it.

    Args:
        draws: Draws of each kind; the first ten are not counted.
        size: Side of the views in pixels.
    """
    with tempfile.TemporaryDirectory() as name:
        mesh = write_procedural(name, [0])[0]
        folder = render_object(mesh, Path(name) / "views", RenderOptions(size=size), "embree")
        sources = {
            "plain": PairSource(open_views(folder)),
            "augmented": PairSource(open_views(folder), augment=Augment()),
        }
        times: dict[str, list[float]] = {kind: [] for kind in sources}
        for i in range(draws + 10):
            for kind, source in sources.items():
                start = time.perf_counter()
                source.draw(i)
                times[kind].append(time.perf_counter() - start)
    for kind, seconds in times.items():
        median = sorted(seconds[10:])[draws // 2]
        sys.stdout.write(f"{kind}: {1e3 * median:.1f} ms a draw (median of {draws}, {size} px)\n")


if __name__ == "__main__":
    auto_cli(bench)
