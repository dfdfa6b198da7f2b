"""`equifeat render MESH... --out DIR`: the command, with its progress."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.render import RenderOptions, find_meshes, render_many
from data_prep.render_summary import ObjectReport, RenderSummary
from data_prep.renderers import RendererName, choose_renderer
from data_prep.viewpoints import ViewpointOptions


def render_command(
    meshes: list[Path],
    out: Path,
    renderer: RendererName = "auto",
    size: int = 512,
    views: int = 42,
    distance: float = 2.0,
    elevation: tuple[float, float] = (-90.0, 90.0),
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
        What became of each mesh; failures do not stop the others.

    Raises:
        EquifeatError: An option is wrong, no mesh is found, or no renderer works here.
    """
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

        summary = render_many(files, out, options, choice.name, show, workers)
    console.print(str(summary), markup=False, soft_wrap=True)
    return summary
