"""One mesh to one folder of views."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.backgrounds import compose
from data_prep.coverage import CoverageCheck
from data_prep.limits import MeshLimits
from data_prep.mesh import Mesh, load_mesh
from data_prep.randomize import SceneOptions, draw_scene
from data_prep.renderers import Renderer, RendererName, open_renderer
from data_prep.renderers.cycles import CyclesOptions
from data_prep.stopwatch import Stopwatch
from data_prep.view_folder import ViewFolderWriter, depth_step, finished_record
from data_prep.viewpoints import ViewpointOptions, Viewpoints, make_viewpoints
from equifeat.errors import RenderError


@dataclass(frozen=True)
class RenderOptions:
    """What to render of each object.

    Args:
        size: Side of the square images in pixels.
        viewpoints: Where the cameras stand.
        normals: Whether to write normal maps as well.
        overwrite: Whether to render finished objects again.
        scene: Light and background.
        cycles: Settings of the path tracer, unused by the other renderers.
        limits: Which meshes are too large; changes no picture, so it is not recorded.
    """

    size: int = 512
    viewpoints: ViewpointOptions = field(default_factory=ViewpointOptions)
    normals: bool = False
    overwrite: bool = False
    scene: SceneOptions = field(default_factory=SceneOptions)
    cycles: CyclesOptions = field(default_factory=CyclesOptions)
    limits: MeshLimits = field(default_factory=MeshLimits)

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 8192:
            raise RenderError(f"size = {self.size}: give 16 to 8192 pixels")

    def record(self) -> dict[str, Any]:
        """Return what goes to views.json: everything that changes the pictures."""
        points = dataclasses.asdict(self.viewpoints)
        points["elevation"] = list(points["elevation"])
        scene = self.scene.record()
        record = {"size": self.size, "normals": self.normals, **points, "scene": scene}
        if self.cycles.record() != CyclesOptions().record():
            record["cycles"] = self.cycles.record()
        return record


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
        options: Size, viewpoints, light, background and so on.
        renderer: "auto", "pyrender", "embree" or "cycles".

    Returns:
        The object's folder. A finished one of the same source and options is left as it is.

    Raises:
        MeshError: The mesh cannot be used.
        RenderError: A view came out wrong, or the folder holds another rendering.
    """
    return render_or_skip(mesh, Path(out_dir), options or RenderOptions(), renderer)[0]


def render_or_skip(
    mesh: Mesh | str | Path,
    out_dir: Path,
    options: RenderOptions,
    renderer: RendererName,
    name: str | None = None,
    watch: Stopwatch | None = None,
) -> tuple[Path, bool]:
    """Do what `render_object` does and tell whether there was anything to do.

    Args:
        mesh: A mesh, or a file to load.
        out_dir: The parent of the object's folder.
        options: Size, viewpoints, light, background and so on.
        renderer: "auto", "pyrender", "embree" or "cycles".
        name: The object's name and its folder below out_dir, with slashes; by default the mesh's.
        watch: Gets the time spent on encoding and writing.

    Returns:
        The object's folder and whether it was rendered now.
    """
    mesh = mesh if isinstance(mesh, Mesh) else load_mesh(mesh, options.limits)
    name = name or mesh.name
    folder = out_dir / name
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
    opened = open_renderer(renderer, mesh, options.cycles)
    scenes = []
    try:
        step = depth_step(_max_depth(mesh, views))
        with ViewFolderWriter(folder, step, out_dir, watch) as writer:
            for i in range(options.viewpoints.count):
                K, pose = views.K[i].numpy(), views.cam_from_world[i].numpy()
                scene = draw_scene(options.scene, name, i, size_hw)
                view = opened.render(K, pose, size_hw, options.normals, scene.lights)
                check(K, pose, view.depth, f"{mesh.file or mesh.name}, view {i}")
                writer.add(compose(view, scene.background), K, pose)
                scenes.append(scene.record)
            record = _record(mesh, name, options, opened)
            # with the fixed light over black there is nothing to tell
            if options.scene != SceneOptions(seed=options.scene.seed):
                record["scenes"] = scenes
            writer.finish(record)
    finally:
        opened.close()
    return folder, True


def _record(mesh: Mesh, name: str, options: RenderOptions, renderer: Renderer) -> dict[str, Any]:
    return {
        "object": name,
        "size_hw": [options.size, options.size],
        "object_scale": mesh.scale,
        "object_center": [float(x) for x in mesh.center],
        "renderer": {
            "name": renderer.name,
            "version": renderer.version,
            "device": renderer.device,
            **renderer.details,
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
    # folders of earlier versions lack what these did not know, and were rendered by its defaults
    default = RenderOptions().record()
    differ = [
        key for key in {**wanted, **found} if wanted.get(key) != found.get(key, default.get(key))
    ]
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
