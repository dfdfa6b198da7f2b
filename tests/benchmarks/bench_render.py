"""Views per core-second of the whole render pipeline: load, draw, encode, write.

python tests/benchmarks/bench_render.py --meshes ../shared/meshes/train ../shared/meshes/val
    --out bench_views [--renderers pyrender embree] [--size 512] [--views 42]

A core-second is one second of one CPU core (user and system time of the process with its threads,
so a renderer that runs on four cores is charged four times). Imports and opening the renderer are
not counted; loading each mesh is. For a GL software driver set LP_NUM_THREADS=1.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from data_prep.contact import contact_sheet
from data_prep.render import ObjectReport, RenderOptions, find_meshes, render_many
from data_prep.renderers import RendererName, choose_renderer
from data_prep.viewpoints import ViewpointOptions


def main(
    meshes: list[Path],
    out: Path,
    renderers: list[RendererName],
    size: int,
    views: int,
) -> None:
    """Measure renderers over meshes.

    Args:
        meshes: Mesh files or folders.
        out: Where the views and contact sheets go; existing views are rendered again.
        renderers: Which to measure.
        size: Side of the images.
        views: Views an object.
    """
    torch.set_num_threads(1)
    files = find_meshes(meshes)
    for name in renderers:
        choice = choose_renderer(name)
        options = RenderOptions(size, ViewpointOptions(count=views), overwrite=True)
        slowest: list[tuple[float, str]] = []
        last = time.process_time()

        def note(report: ObjectReport, slowest: list[tuple[float, str]] = slowest) -> None:
            nonlocal last
            now = time.process_time()
            slowest.append(((now - last) / max(report.views, 1), Path(report.source).name))
            last = now

        start = last
        summary = render_many(files, out / name, options, name, note)
        core_seconds = time.process_time() - start
        done = sum(r.views for r in summary.reports)
        size_mb = sum(f.stat().st_size for f in (out / name).rglob("*.png")) / 1e6
        lines = [
            f"{choice.name}: {choice.reason}",
            f"  {summary}",
            f"  {done} views of {size} px in {core_seconds:.1f} core-seconds: "
            f"{done / core_seconds:.2f} views per core-second",
            f"  {size_mb / max(summary.count('done'), 1):.1f} MB an object",
            "  slowest (core-seconds a view): "
            + ", ".join(f"{file} {t:.3f}" for t, file in sorted(slowest, reverse=True)[:3]),
            *[f"  FAILED {source}: {error}" for source, error in summary.failures],
        ]
        sheet = contact_sheet(out / name, out / f"contact_{name}.png")
        sys.stdout.write("\n".join([*lines, f"  contact sheet: {sheet}", ""]))
        sys.stdout.flush()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--meshes", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--renderers", nargs="+", default=["pyrender", "embree"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--views", type=int, default=42)
    main(**vars(parser.parse_args()))
