"""Pairs a second from a folder and from the packed set of the same views, cold, on one core."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli

from data_prep.pack import pack_views
from equifeat.data import folder_views, packed_views
from equifeat.data.augment import Augment
from equifeat.data.datamodule import PairDataModule
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views


def bench(
    views: Path | None = None, objects: int = 12, draws: int = 60, rounds: int = 5, workers: int = 2
) -> None:
    """Time draws from a folder and its packed set; both kinds take turns in one process.

    Args:
        views: Folder of rendered views; without one procedural objects are rendered at 512 px.
        objects: How many to render.
        draws: Draws of a round.
        rounds: Rounds; the median counts.
        workers: Loader processes of the second measurement.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = views or _render(Path(name), objects)
        _say(pack_views([folder], Path(name) / "packed"))
        sets = {"folder": folder, "packed": Path(name) / "packed"}
        for augment in (None, Augment()):
            kind = "augmented" if augment else "plain"
            _compare(
                f"one core, {kind}",
                {which: _draw_time(path, augment, draws, rounds) for which, path in sets.items()},
            )
        _compare(
            f"DataLoader, {workers} workers, plain",
            {which: _loader_time(path, draws, workers) for which, path in sets.items()},
        )
        for which, path in sets.items():
            start = time.perf_counter()
            found = open_views(path)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            _say(
                f"{which}: {len(found)} objects opened in {1e3 * (time.perf_counter() - start):.0f}"
                f" ms, {size / sum(map(len, found)) / 1e3:.1f} kB a view"
            )


def _render(root: Path, objects: int) -> Path:
    from data_prep.procedural import write_procedural
    from data_prep.render_object import RenderOptions, render_object

    for mesh in write_procedural(root / "meshes", list(range(objects))):
        render_object(mesh, root / "views" / mesh.stem, RenderOptions(size=512), "embree")
    return root / "views"


def _draw_time(path: Path, augment: Augment | None, draws: int, rounds: int) -> float:
    """Seconds a draw; the cache of decoded views is emptied before each, as with many objects."""
    source = PairSource(open_views(path), augment=augment)
    medians = []
    for turn in range(rounds + 1):
        spent = 0.0
        for i in range(turn * draws, (turn + 1) * draws):
            folder_views._decode.cache_clear()
            packed_views._decode.cache_clear()
            start = time.perf_counter()
            source.draw(i)
            spent += time.perf_counter() - start
        medians.append(spent / draws)
    return statistics.median(medians[1:])  # the first round fills the page cache


def _loader_time(path: Path, draws: int, workers: int) -> float:
    """Seconds a pair that the training process sees."""
    data = PairDataModule(
        path, num_workers=workers, augment=False, batch_size=4, draws_per_epoch=8 * draws
    )
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    start = time.perf_counter()
    pairs = sum(len(batch.draws) for batch in batches)
    return (time.perf_counter() - start) / pairs


def _compare(what: str, seconds: dict[str, float]) -> None:
    rates = ", ".join(f"{which} {1 / each:.1f}" for which, each in seconds.items())
    _say(f"{what}: {rates} pairs/s, packed is {seconds['folder'] / seconds['packed']:.2f} times")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}{os.linesep}")


if __name__ == "__main__":
    auto_cli(bench)
