"""Meshes to folders of views: one object, many objects, and the `equifeat render` command."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.coverage import CoverageCheck
from data_prep.mesh import SUFFIXES, Mesh, load_mesh
from data_prep.render_summary import ObjectReport, RenderSummary, Status
from data_prep.renderers import Renderer, RendererName, choose_renderer, open_renderer
from data_prep.view_folder import ViewFolderWriter, depth_step, finished_record
from data_prep.viewpoints import ViewpointOptions, Viewpoints, make_viewpoints
from equifeat.errors import EquifeatError, MeshError, RenderError

__all__ = [
    "ObjectReport",
    "RenderOptions",
    "RenderSummary",
    "ViewpointOptions",
    "find_meshes",
    "render_many",
    "render_object",
]


@dataclass(frozen=True)
class RenderOptions:
    """What to render of each object.

    Args:
        size: Side of the square images in pixels.
        viewpoints: Where the cameras stand.
        normals: Whether to write normal maps as well.
        overwrite: Whether to render finished objects again.
    """

    size: int = 512
    viewpoints: ViewpointOptions = field(default_factory=ViewpointOptions)
    normals: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 8192:
            raise RenderError(f"size = {self.size}: give 16 to 8192 pixels")

    def record(self) -> dict[str, Any]:
        """Return what goes to views.json: everything that changes the pictures."""
        points = dataclasses.asdict(self.viewpoints)
        points["elevation"] = list(points["elevation"])
        return {"size": self.size, "normals": self.normals, **points}


def render_object(
    mesh: Mesh | str | Path,
    out_dir: str | Path,
    options: RenderOptions | None = None,
    renderer: RendererName = "auto",
) -> Path:
    """Render one object to a folder named after it.

    Args:
        mesh: A mesh, or a file to load.
        out_dir: The parent of the object's folder.
        options: Size, viewpoints, normals, overwrite.
        renderer: "auto", "pyrender" or "embree".

    Returns:
        The object's folder. A finished one of the same source and options is left as it is.

    Raises:
        MeshError: The mesh cannot be used.
        RenderError: A view came out wrong, or the folder holds another rendering.
    """
    return _render(mesh, Path(out_dir), options or RenderOptions(), renderer)[0]


def _render(
    mesh: Mesh | str | Path, out_dir: Path, options: RenderOptions, renderer: RendererName
) -> tuple[Path, bool]:
    """Return the object's folder and whether it was rendered now."""
    mesh = mesh if isinstance(mesh, Mesh) else load_mesh(mesh)
    folder = out_dir / mesh.name
    if not options.overwrite:
        record = finished_record(folder)
        if record is not None:
            _check_same(folder, record, mesh, options, renderer)
            return folder, False
    elif folder.exists():
        finished_record(folder)
    size_hw = (options.size, options.size)
    views = make_viewpoints(options.viewpoints, size_hw)
    check = CoverageCheck(mesh)
    opened = open_renderer(renderer, mesh)
    try:
        with ViewFolderWriter(folder, depth_step(_max_depth(mesh, views))) as writer:
            for i in range(options.viewpoints.count):
                K, pose = views.K[i].numpy(), views.cam_from_world[i].numpy()
                view = opened.render(K, pose, size_hw, options.normals)
                check(K, pose, view.depth, f"{mesh.file or mesh.name}, view {i}")
                writer.add(view, K, pose)
            writer.finish(_record(mesh, options, opened))
    finally:
        opened.close()
    return folder, True


def _record(mesh: Mesh, options: RenderOptions, renderer: Renderer) -> dict[str, Any]:
    return {
        "object": mesh.name,
        "size_hw": [options.size, options.size],
        "object_scale": mesh.scale,
        "object_center": [float(x) for x in mesh.center],
        "renderer": {
            "name": renderer.name,
            "version": renderer.version,
            "device": renderer.device,
        },
        "source": {"file": mesh.file, "sha256": mesh.sha256},
        "options": options.record(),
    }


def _check_same(
    folder: Path,
    record: dict[str, Any],
    mesh: Mesh,
    options: RenderOptions,
    renderer: RendererName,
) -> None:
    """Refuse to take a finished folder for something it is not."""
    wanted, found = options.record(), record.get("options", {})
    differ = [k for k in wanted if wanted[k] != found.get(k)]
    if record.get("source", {}).get("sha256") != mesh.sha256:
        differ.append("source file")
    if renderer != "auto" and record.get("renderer", {}).get("name") != renderer:
        differ.append("renderer")
    if differ:
        raise RenderError(
            f"{folder}: was rendered with another {', '.join(differ)}; "
            "give --overwrite or another --out"
        )


def _max_depth(mesh: Mesh, views: Viewpoints) -> float:
    """Return the largest z-depth of any vertex in any view."""
    vertices = mesh.vertices.astype(np.float64)
    rows = views.cam_from_world[:, 2].numpy()
    return max(float((vertices @ row[:3]).max() + row[3]) for row in rows)


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
    for report in _reports(files, Path(out_dir), options, choice.name, workers):
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
        folder, now = _render(file, out, options, renderer)
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
