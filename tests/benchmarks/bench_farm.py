"""The render farm: how it grows with workers, where the time goes, what a large set would cost.

python tests/benchmarks/bench_farm.py --out bench_farm [--meshes ../shared/meshes/train]
    [--objects 300] [--rounds 3] [--part 12] [--renderer pyrender] [--size 512] [--views 42]

First some objects are rendered by 1 and by 2 workers in turn, several times: the ratio of one round
is free of what else the machine did meanwhile, as far as that can be had. Workers are started and
warm before the clock runs. Then many objects are rendered once by all workers. With fewer meshes
than objects the meshes are repeated under other names; without any, procedural ones are made.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path

from jsonargparse import ArgumentParser

from data_prep.farm import Engine, FarmOptions, Task, open_engine, run_tasks
from data_prep.farm_render import RenderJob, render_job
from data_prep.procedural import write_procedural
from data_prep.render import RenderOptions, find_objects
from data_prep.render_many import open_run
from data_prep.renderers import RendererName
from data_prep.viewpoints import ViewpointOptions
from equifeat.progress import progress

LARGE = (10_000, 800_000)


def seconds_of(engine: Engine, jobs: list[RenderJob], out: Path) -> float:
    """Return the wall-clock seconds of rendering jobs with warm workers."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    for result in run_tasks(render_job, [Task(j.id, j._replace(out=out)) for j in jobs], engine):
        if result.reply.fault is not None:
            raise SystemExit(f"{result.task.id}: {result.reply.fault.why}")
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def growth(jobs: list[RenderJob], out: Path, rounds: int) -> str:
    """Compare 1 and 2 workers on the same objects."""
    engines = [open_engine(FarmOptions("local", workers)) for workers in (1, 2)]
    try:
        for engine in engines:  # imports, GL contexts, the disk's cache
            seconds_of(engine, jobs[: 2 * engine.slots()], out)
        pairs = [[seconds_of(e, jobs, out) for e in engines] for _ in range(rounds)]
    finally:
        for engine in engines:
            engine.close()
    ratios = [one / two for one, two in pairs]
    times = ", ".join(f"{one:.1f}/{two:.1f} s" for one, two in pairs)
    return (
        f"2 workers against 1: {statistics.median(ratios):.2f}x the objects/hour "
        f"(median of {rounds} rounds of {len(jobs)} objects: {times})"
    )


def main(
    out: Path,
    meshes: list[Path],
    objects: int,
    rounds: int,
    part: int,
    workers: int,
    renderer: RendererName,
    size: int,
    views: int,
) -> None:
    """Measure the farm.

    Args:
        out: A folder for the views, emptied first.
        meshes: Mesh files or folders; none = procedural ones.
        objects: Number of objects of the large run; 0 leaves it out.
        rounds: Rounds of the comparison of 1 and 2 workers; 0 leaves it out.
        part: Objects of each round.
        workers: Workers of the large run.
        renderer: Which renderer.
        size: Side of the images.
        views: Views an object.
    """
    if not meshes:
        write_procedural(out / "meshes", range(max(part, min(objects, 24))))
        meshes = [out / "meshes"]
    found = list(find_objects(meshes).items())
    options = RenderOptions(size, ViewpointOptions(count=views))
    if rounds:
        jobs = [RenderJob(n, f.resolve(), out, options, renderer) for n, f in found[:part]]
        sys.stdout.write(growth(jobs, out / "rounds", rounds) + "\n")
        sys.stdout.flush()
    if not objects:
        return
    many = {
        f"{i // len(found):03d}/{name}": file
        for i, (name, file) in ((i, found[i % len(found)]) for i in range(objects))
    }
    large = out / "large"
    shutil.rmtree(large, ignore_errors=True)
    with open_run(many, large, options, renderer, FarmOptions("local", workers)) as run:
        for _ in progress(run.reports, "rendering", run.total):
            pass
    summary = run.summary
    done = max(summary.count("done"), 1)
    size_of = sum(f.stat().st_size for f in large.rglob("*") if f.is_file()) / done
    lines = [f"{objects} objects of {len(found)} meshes, {workers} workers: {summary}"]
    for count in LARGE:
        lines.append(
            f"{count} objects: {summary.cpu / done * count / 3600:.3g} CPU-hours, "
            f"{size_of * count / 1e9:.3g} GB"
        )
    lines += [f"FAILED {source}: {error}" for source, error in summary.failures]
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--meshes", nargs="*", type=Path, default=[])
    parser.add_argument("--objects", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--renderer", default="pyrender")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--views", type=int, default=42)
    main(**vars(parser.parse_args()))
