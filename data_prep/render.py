"""The `equifeat render` command, and the names that Python callers need."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data_prep.farm import EngineName, FarmOptions
from data_prep.limits import MeshLimits
from data_prep.mesh_files import find_objects
from data_prep.randomize import LightMode, SceneOptions
from data_prep.render_many import open_run, render_many
from data_prep.render_object import RenderOptions, render_object
from data_prep.render_summary import ObjectReport, RenderSummary
from data_prep.renderers import RendererName
from data_prep.renderers.cycles import CyclesOptions
from data_prep.viewpoints import ViewpointOptions
from equifeat.errors import RenderError
from equifeat.progress import progress

__all__ = [
    "FarmOptions",
    "ObjectReport",
    "RenderOptions",
    "RenderSummary",
    "SceneOptions",
    "ViewpointOptions",
    "find_meshes",
    "find_objects",
    "render_command",
    "render_many",
    "render_object",
]


def find_meshes(paths: Sequence[str | Path]) -> list[Path]:
    """Expand files, folders, patterns and lists to mesh files.

    Args:
        paths: See `data_prep.mesh_files.find_objects`.

    Returns:
        Files, in the order given; those of a folder are sorted.

    Raises:
        MeshError: A path does not exist, or holds no mesh.
    """
    return list(find_objects(paths).values())


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
    distance_jitter: float = 0.0,
    angle_jitter: float = 0.0,
    light: LightMode = "fixed",
    lights: int = 1,
    light_elevation: float = -90.0,
    light_distance: float = 0.0,
    light_intensity: float = 0.4,
    ambient: float = 0.45,
    head_light: float = 0.15,
    light_jitter: float = 0.0,
    light_saturation: float = 0.0,
    environment: str = "",
    background: str = "black",
    seed: int = 0,
    cycles_python: str = "",
    cycles_samples: int = 16,
    cycles_denoise: bool = True,
    cycles_device: Literal["cpu", "gpu"] = "cpu",
    cycles_threads: int = 0,
    overwrite: bool = False,
    normals: bool = False,
    max_triangles: int = 5_000_000,
    engine: EngineName = "local",
    workers: int | None = None,
    time_limit: float = 900.0,
    memory_limit: float = 8.0,
    retries: int = 1,
    retry_failed: bool = False,
    address: str | None = None,
    source: str | None = None,
) -> RenderSummary:
    """Render meshes to folders of views: RGB, z-depth, mask and views.json, one folder an object.

    Args:
        meshes: GLB, glTF, OBJ or PLY files, folders of them, quoted patterns, or .txt lists.
        out: Folder that receives one folder an object. Finished objects in it are skipped.
        renderer: pyrender (OpenGL on EGL), embree (ray casting, needs no driver), cycles (path
            tracing with bpy), or auto: pyrender where EGL works, else embree.
        size: Side of the square images in pixels.
        views: Number of views; 42 are the vertices of an icosphere.
        distance: From the camera to the object's centre; the object's longest side is 1.
        elevation: Lowest and highest camera elevation in degrees.
        fov: Field of view in degrees; by default f = 560 px at 512 px (49.1 degrees).
        roll_jitter: Largest random roll in degrees.
        look_at_jitter: Largest random shift of the point looked at, in object units.
        focal_jitter: Largest random relative change of the focal length.
        distance_jitter: Largest random relative change of the distance.
        angle_jitter: Largest random turn of the camera's place about the object, in degrees.
        light: fixed (stands still), object (drawn once an object) or view (drawn for each view).
        lights: Most drawn lights, 1 to 8.
        light_elevation: Lowest elevation of a drawn light in degrees.
        light_distance: Of drawn lights from the object's centre, 0 for infinitely far.
        light_intensity: All lights together, as a share of full brightness.
        ambient: Light from all sides.
        head_light: Light at the camera.
        light_jitter: Largest random relative change of light_intensity and ambient.
        light_saturation: Greatest random saturation of the light's colours.
        environment: Folder of .hdr or .exr pictures that light the object (cycles only).
        background: black, white, #rrggbb, color (a random one), noise, gradient or a folder.
        seed: Seed of cameras, light and background.
        cycles_python: Interpreter that holds bpy, see docs/renderers.md.
        cycles_samples: Paths a pixel.
        cycles_denoise: Denoise path-traced pictures.
        cycles_device: cpu or gpu.
        cycles_threads: Threads of one path tracer; by default the workers share the cores.
        overwrite: Render finished objects again.
        normals: Write normal maps as well.
        max_triangles: Refuse meshes with more triangles, instances counted.
        engine: local (processes of this machine), ray (a Ray cluster), or here (one after another
            in this process, without limits).
        workers: Objects at once, by default 1, and every core of a Ray cluster.
        time_limit: Seconds an object may take, 0 for any.
        memory_limit: GiB that a worker may use, 0 for any.
        retries: Further tries of an object after a crash, a limit or a wrong picture.
        retry_failed: Try objects again that failed in an earlier run.
        address: Of the Ray cluster, by default the one found or a new one on this machine.
        source: One more mesh, folder, pattern or list.

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
        distance_jitter=distance_jitter,
        angle_jitter=angle_jitter,
        seed=seed,
    )
    scene = SceneOptions(
        light=light,
        lights=lights,
        light_elevation=light_elevation,
        light_distance=light_distance,
        light_intensity=light_intensity,
        ambient=ambient,
        head_light=head_light,
        light_jitter=light_jitter,
        light_saturation=light_saturation,
        environment=environment,
        background=background,
        seed=seed,
    )
    if environment and renderer != "cycles":
        raise RenderError("environment pictures light cycles only; give --renderer cycles as well")
    if not cycles_threads and (workers or 1) > 1:
        cycles_threads = max(1, (os.cpu_count() or 1) // (workers or 1))
    cycles = CyclesOptions(
        cycles_python, cycles_samples, cycles_denoise, cycles_device, cycles_threads
    )
    limits = MeshLimits(max_triangles=max_triangles)
    options = RenderOptions(size, viewpoints, normals, overwrite, scene, cycles, limits)
    farm = FarmOptions(
        engine,
        workers,
        None if time_limit == 0 else time_limit,
        None if memory_limit == 0 else memory_limit,
        retries,
        retry_failed,
        address,
    )
    given: list[str | Path] = [*meshes, *([source] if source else [])]
    if not given:
        raise RenderError("no meshes given: name files, folders, patterns or .txt lists")
    with open_run(find_objects(given), out, options, renderer, farm) as run:
        _say(f"renderer: {run.summary.renderer} ({run.summary.reason})")
        told = 0
        for report in progress(run.reports, "rendering", run.total):
            if report.status == "failed" and not report.earlier:
                _say(f"failed: {report.error}")
            for warning in run.summary.warnings[told:]:
                _say(f"warning: {warning}")
            told = len(run.summary.warnings)
    if run.summary.failures:
        _say(str(run.summary))
        failed, error = len(run.summary.failures), run.summary.failures[0][1]
        raise RenderError(
            error if run.total == 1 else f"{failed} of {run.total} meshes failed, first {error}"
        )
    return run.summary


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
