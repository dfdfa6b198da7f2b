"""Views per core-second of the whole render pipeline: load, draw, check, encode, write.

python tests/benchmarks/bench_render.py --meshes ../shared/meshes/train ../shared/meshes/val
    --out bench_views [--renderers pyrender embree] [--size 512] [--views 42]

A core-second is one second of one CPU core (user and system time of the worker process and of what
it started, so a renderer that runs on four cores is charged four times). Imports and opening the
renderer are charged to the first object; loading each mesh is counted. Workers keep libraries and
GL software drivers to one thread.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from data_prep.contact import contact_sheet
from data_prep.render import FarmOptions, ObjectReport, RenderOptions, find_objects, render_many
from data_prep.renderers import RendererName
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
    objects = find_objects(meshes)
    options = RenderOptions(size, ViewpointOptions(count=views), overwrite=True)
    for name in renderers:
        slowest: list[tuple[float, str]] = []

        def note(report: ObjectReport, slowest: list[tuple[float, str]] = slowest) -> None:
            if report.views:
                slowest.append((report.cpu / report.views, Path(report.source).name))

        # one worker, as in the farm: its memory and its threads are those of real runs
        summary = render_many(objects, out / name, options, name, note, FarmOptions("local"))
        size_mb = sum(f.stat().st_size for f in (out / name).rglob("*.png")) / 1e6
        lines = [
            f"{summary.renderer}: {summary.reason}",
            *[f"  {line}" for line in str(summary).splitlines()],
            f"  {summary.views} views of {size} px in {summary.cpu:.1f} core-seconds: "
            f"{summary.views / max(summary.cpu, 1e-9):.2f} views per core-second",
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
