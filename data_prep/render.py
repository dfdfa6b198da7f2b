"""Many meshes to folders of views, and the `equifeat render` command."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.mesh import SUFFIXES
from data_prep.render_object import RenderOptions, render_object, render_or_skip
from data_prep.render_summary import ObjectReport, RenderSummary, Status
from data_prep.renderers import RendererName, choose_renderer
from data_prep.viewpoints import ViewpointOptions
from equifeat.errors import EquifeatError, MeshError, RenderError

__all__ = [
    "ObjectReport",
    "RenderOptions",
    "RenderSummary",
    "ViewpointOptions",
    "find_meshes",
    "render_command",
    "render_many",
    "render_object",
]


def render_many(
    paths: Sequence[str | Path],
    out_dir: str | Path,
    options: RenderOptions | None = None,
    renderer: RendererName = "auto",
    progress: Callable[[ObjectReport], None] | None = None,
    workers: int = 1,
) -> RenderSummary:
    """Render many files; one that fails does not stop the others.

    Args:
        paths: Mesh files.
        out_dir: The parent of the objects' folders.
        options: Size, viewpoints, normals, overwrite.
        renderer: "auto", "pyrender" or "embree"; decided once for all objects.
        progress: Called after each object.
        workers: Processes; 1 renders in this one.

    Returns:
        A summary with one report an object.

    Raises:
        RenderError: No renderer works here, or two meshes would share a folder.
    """
    files = [Path(p) for p in paths]
    _check_names(files)
    options = options or RenderOptions()
    if workers < 1:
        raise RenderError(f"workers = {workers}: give at least 1")
    choice = choose_renderer(renderer)
    summary = RenderSummary(renderer=choice.name, reason=choice.reason)
    start = time.perf_counter()
    for report in _reports(files, Path(out_dir), options, renderer, workers):
        summary.reports.append(report)
        if progress is not None:
            progress(report)
    summary.seconds = time.perf_counter() - start
    return summary


def _check_names(files: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(file.stem, file)
        if other is not file:
            raise RenderError(f"{other} and {file} would both be written to {file.stem!r}")


def _reports(
    files: list[Path], out: Path, options: RenderOptions, renderer: RendererName, workers: int
) -> Iterator[ObjectReport]:
    if workers == 1:
        yield from (_report(file, out, options, renderer) for file in files)
        return
    # spawn: a forked GL context does not work
    spawn = get_context("spawn")
    left = set(files)
    try:
        with ProcessPoolExecutor(min(workers, len(files) or 1), mp_context=spawn) as pool:
            futures = {pool.submit(_report, f, out, options, renderer): f for f in files}
            for future in as_completed(futures):
                report = future.result()
                left.discard(futures[future])
                yield report
    except BrokenProcessPool:
        pass
    # a driver that crashes takes the pool with it: find the object that does it, one by one
    for file in [f for f in files if f in left]:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            try:
                report = pool.submit(_report, file, out, options, renderer).result()
            except BrokenProcessPool:
                error = f"{file}: the renderer's process crashed; try --renderer embree"
                report = ObjectReport(str(file), "failed", None, 0, 0.0, error)
        yield report


def _report(file: Path, out: Path, options: RenderOptions, renderer: RendererName) -> ObjectReport:
    start = time.perf_counter()
    try:
        folder, now = render_or_skip(file, out, options, renderer)
    except EquifeatError as error:
        message = str(error)
    except Exception as error:  # one object must not end a run of thousands
        message = f"{file}: unexpected {type(error).__name__}: {error}"
    else:
        views = options.viewpoints.count if now else 0
        status: Status = "done" if now else "skipped"
        return ObjectReport(str(file), status, folder, views, time.perf_counter() - start)
    return ObjectReport(str(file), "failed", None, 0, time.perf_counter() - start, message)


def find_meshes(paths: Sequence[Path]) -> list[Path]:
    """Expand folders to the mesh files in them.

    Args:
        paths: Mesh files and folders.

    Returns:
        Files; those of a folder are sorted by name.

    Raises:
        MeshError: A path does not exist, or a folder holds no mesh.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise MeshError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise MeshError(f"{path}: no such mesh file or folder")
    return files


def render_command(
    meshes: list[Path],
    out: Path,
    renderer: RendererName = "auto",
    size: int = 512,
    views: int = 42,
    distance: float = 2.0,
    elevation: tuple[float, float] | list[float] = (-90.0, 90.0),
    fov: float | None = None,
    roll_jitter: float = 0.0,
    look_at_jitter: float = 0.0,
    focal_jitter: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
    normals: bool = False,
    workers: int = 1,
) -> RenderSummary:
    """Render meshes to folders of views: RGB, z-depth, mask and views.json, one folder an object.

    Args:
        meshes: GLB, glTF, OBJ or PLY files, or folders of them.
        out: Folder that receives one folder an object. Finished objects in it are skipped.
        renderer: pyrender (OpenGL on EGL), embree (ray casting, needs no driver), or auto:
            pyrender where EGL works, else embree.
        size: Side of the square images in pixels.
        views: Number of views; 42 are the vertices of an icosphere.
        distance: From the camera to the object's centre; the object's longest side is 1.
        elevation: Lowest and highest camera elevation in degrees.
        fov: Field of view in degrees; by default f = 560 px at 512 px (49.1 degrees).
        roll_jitter: Largest random roll in degrees.
        look_at_jitter: Largest random shift of the point looked at, in object units.
        focal_jitter: Largest random relative change of the focal length.
        seed: Seed of the jitters.
        overwrite: Render finished objects again.
        normals: Write normal maps as well.
        workers: Processes.

    Returns:
        What became of each mesh, with objects/hour.

    Raises:
        EquifeatError: An option is wrong, no mesh is found, no renderer works here, or, after all
            the others were rendered, some meshes failed.
    """
    if len(elevation) != 2:
        raise RenderError(f"elevation = {elevation}: give two numbers, MIN and MAX")
    viewpoints = ViewpointOptions(
        count=views,
        distance=distance,
        elevation=(float(elevation[0]), float(elevation[1])),
        fov=fov,
        roll_jitter=roll_jitter,
        look_at_jitter=look_at_jitter,
        focal_jitter=focal_jitter,
        seed=seed,
    )
    options = RenderOptions(size, viewpoints, normals, overwrite)
    files = find_meshes(meshes)
    choice = choose_renderer(renderer)
    console = Console(stderr=True, highlight=False)
    console.print(f"renderer: {choice.name} ({choice.reason})", markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("rendering", total=len(files))
        done = 0

        def show(report: ObjectReport) -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            line = report.error or f"{report.source} {report.status} in {report.seconds:.1f} s"
            if report.status == "failed" or not console.is_terminal:
                bar.console.print(f"[{done}/{len(files)}] {line}", markup=False, soft_wrap=True)

        summary = render_many(files, out, options, renderer, show, workers)
    if summary.failures:
        console.print(str(summary), markup=False, soft_wrap=True)
        failed, error = len(summary.failures), summary.failures[0][1]
        raise RenderError(
            error if len(files) == 1 else f"{failed} of {len(files)} meshes failed, first {error}"
        )
    return summary
