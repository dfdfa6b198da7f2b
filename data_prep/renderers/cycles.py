"""Path tracing with Blender's Cycles (PyPI bpy), in a process and an environment of its own.

bpy pins NumPy 1.26 and Python 3.11. So it is never imported here: a worker script runs under
another interpreter and answers over pipes. One worker serves all meshes of a process.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import os
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.mesh import Mesh
from data_prep.renderers import Rendered
from data_prep.renderers.cycles_process import WorkerProcess
from data_prep.renderers.cycles_request import linear_lights, pack_mesh
from data_prep.renderers.lights import FIXED_LIGHT, Lights
from data_prep.renderers.window import projected_window
from equifeat.errors import RenderError

Array = NDArray[Any]
BPY = "bpy==5.0.1"
PYTHON_VARIABLE = "EQUIFEAT_CYCLES_PYTHON"
_WORKER = Path(__file__).with_name("cycles_worker.py")
_START_SECONDS = 180.0
_LOAD_SECONDS = 600.0


@dataclass(frozen=True)
class CyclesOptions:
    """Settings of the path tracer.

    Args:
        python: Interpreter of the environment that holds bpy; empty takes the variable
            EQUIFEAT_CYCLES_PYTHON, then the documented place.
        samples: Paths a pixel.
        denoise: Whether Open Image Denoise runs over the colours.
        device: "cpu" or "gpu" (the first GPU that OptiX, CUDA, HIP, Metal or oneAPI shows).
        threads: Of the CPU; 0 takes all.
        seconds: Time limit of one view.
    """

    python: str = ""
    samples: int = 16
    denoise: bool = True
    device: Literal["cpu", "gpu"] = "cpu"
    threads: int = 0
    seconds: float = 600.0

    def __post_init__(self) -> None:
        checks = [
            (1 <= self.samples <= 65536, "samples", "1 to 65536"),
            (self.device in ("cpu", "gpu"), "device", "cpu or gpu"),
            (0 <= self.threads <= 1024, "threads", "0 to 1024"),
            (0.0 < self.seconds < math.inf, "seconds", "a positive number"),
        ]
        for ok, name, allowed in checks:
            if not ok:
                raise RenderError(f"cycles_{name} = {getattr(self, name)!r}: give {allowed}")

    def record(self) -> dict[str, Any]:
        """Return what changes the pictures."""
        return {"samples": self.samples, "denoise": self.denoise}


def default_python() -> Path:
    """Return the interpreter that the documented commands make."""
    root = os.environ.get("XDG_DATA_HOME", "")
    home = Path(root) if root else Path.home() / ".local" / "share"
    return home / "equifeat" / "cycles" / "bin" / "python"


def find_python(options: CyclesOptions) -> str:
    """Return the interpreter that holds bpy.

    Args:
        options: May name it.

    Returns:
        Its path; it exists.

    Raises:
        RenderError: There is none; the sentence says how to make it.
    """
    named = [
        ("--cycles_python", options.python),
        (PYTHON_VARIABLE, os.environ.get(PYTHON_VARIABLE, "")),
    ]
    for where, path in named:
        if path:
            if not Path(path).expanduser().is_file():
                raise RenderError(f"{where} = {path}: there is no such interpreter")
            return str(Path(path).expanduser())
    python = default_python()
    if not python.is_file():
        folder = python.parent.parent
        raise RenderError(
            f"cycles needs bpy in an environment of its own, and {python} is not there: "
            f"python3.11 -m venv {folder} && {folder}/bin/pip install {BPY}; or name another "
            f"interpreter by --cycles_python or {PYTHON_VARIABLE}"
        )
    return str(python)


@functools.cache
def _import_problem(python: str) -> str:
    """Import bpy in its environment and return what is wrong, or an empty string."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", "import bpy"],
            capture_output=True,
            timeout=_START_SECONDS,
            check=False,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} cannot be run ({error})"
    if done.returncode == 0:
        return ""
    words = done.stderr.decode(errors="replace").strip().splitlines()
    last = words[-1] if words else f"exit code {done.returncode}"
    if "No module named 'bpy'" in last:
        return f"{python} has no bpy: {python} -m pip install {BPY}"
    if "cannot open shared object" in last:
        return (
            f"bpy lacks a system library ({last}): install libx11-6 libxrender1 libxxf86vm1 "
            "libxfixes3 libxi6 libxkbcommon0 libsm6 libgl1 libegl1 or what is named here"
        )
    return f"{python} cannot import bpy ({last})"


def unavailable(options: CyclesOptions) -> str:
    """Return why cycles cannot be used here, or an empty string."""
    try:
        return _import_problem(find_python(options))
    except RenderError as error:
        return str(error)


# one worker a process; forked children must not talk to their parent's
_workers: dict[str, tuple[WorkerProcess, dict[str, Any]]] = {}


def _settings(options: CyclesOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {key: values[key] for key in ("samples", "denoise", "device", "threads")}


def _worker(options: CyclesOptions) -> tuple[WorkerProcess, dict[str, Any]]:
    """Return this process's worker for the settings, and what it said of itself."""
    python = find_python(options)
    key = repr((python, _settings(options)))
    known = _workers.get(key)
    if known is not None and known[0].owner == os.getpid() and known[0].alive:
        return known
    close_workers()
    worker = WorkerProcess([python, "-I", str(_WORKER)], "cycles")
    request = {"do": "start", "settings": _settings(options)}
    try:
        facts, _ = worker.ask(request, {}, _START_SECONDS)
    except RenderError:
        worker.close()
        raise
    _workers[key] = (worker, facts)
    return _workers[key]


@atexit.register
def close_workers() -> None:
    """End this process's workers; the next mesh starts another."""
    for worker, _ in _workers.values():
        worker.close()
    _workers.clear()


class CyclesRenderer:
    """Draws one mesh by path tracing.

    Args:
        mesh: The mesh.
        options: Settings.
    """

    name = "cycles"

    def __init__(self, mesh: Mesh, options: CyclesOptions | None = None) -> None:
        self._options = options or CyclesOptions()
        self._vertices = mesh.vertices.astype(np.float64)
        self._process, facts = _worker(self._options)
        self.version = str(facts["bpy"])
        self.device = str(facts["device"])
        self.details = {
            "python": facts["python"],
            "numpy": facts["numpy"],
            **self._options.record(),
        }
        request, arrays = pack_mesh(mesh)
        self._process.ask(request, arrays, _LOAD_SECONDS)

    def close(self) -> None:
        """Do nothing: the worker stays for the next mesh."""

    def render(
        self,
        K: Array,
        cam_from_world: Array,
        size_hw: tuple[int, int],
        normals: bool = False,
        lights: Lights = FIXED_LIGHT,
    ) -> Rendered:
        """See `data_prep.renderers.Renderer`."""
        K, pose = np.asarray(K, np.float64), np.asarray(cam_from_world, np.float64)
        color = np.zeros((*size_hw, 4), np.uint8)
        depth = np.zeros(size_hw, np.float32)
        normal_map = np.zeros((*size_hw, 3), np.float32) if normals else None
        x0, y0, x1, y1 = projected_window(self._vertices, K, pose, size_hw)
        if x1 > x0 and y1 > y0:
            # Blender's cameras look along -z, with y up
            world_from_camera = np.linalg.inv(pose) @ np.diag([1.0, -1.0, -1.0, 1.0])
            request = {
                "do": "render",
                "size_hw": list(size_hw),
                "window": [x0, y0, x1, y1],
                "K": [K[0, 0], K[1, 1], K[0, 2], K[1, 2]],
                "world_from_camera": world_from_camera.tolist(),
                "normals": normals,
                "lights": linear_lights(lights, pose),
                # noise differs from view to view, and not from run to run
                "seed": zlib.crc32(np.round(pose, 6).tobytes()) & 0x7FFFFFFF,
            }
            _, out = self._process.ask(request, {}, self._options.seconds)
            if out["color"].shape != (y1 - y0, x1 - x0, 4):
                raise RenderError(f"cycles: a picture of {out['color'].shape[:2]} came back")
            inside = (slice(y0, y1), slice(x0, x1))
            color[inside], depth[inside] = out["color"], out["depth"]
            if normal_map is not None:
                local = out["normal"] * np.array([1.0, -1.0, 1.0])
                length = np.linalg.norm(local, axis=2, keepdims=True)
                normal_map[inside] = np.where(length > 0.5, local / length.clip(1e-6), 0.0)
        coverage = np.ascontiguousarray(color[..., 3])
        # straight alpha to colour over black
        product = color[..., :3].astype(np.uint16) * coverage[..., None].astype(np.uint16)
        rgb = ((product + 127) // 255).astype(np.uint8)
        return Rendered(rgb, depth, depth > 0, normal_map, coverage)
