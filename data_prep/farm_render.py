"""Rendering as the farm's task: what a worker does with one object."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.farm_gpu import node_has_gpu, software_on_gpu_node
from data_prep.farm_worker import used_cpu
from data_prep.mesh import load_mesh
from data_prep.render_object import RenderOptions, render_or_skip
from data_prep.renderers import RendererName, choose_renderer
from data_prep.stopwatch import Stopwatch
from data_prep.view_folder import finished_record

PARTS = ("load", "render", "encode", "write")


class RenderJob(NamedTuple):
    """One object for a worker.

    Attributes:
        id: Its name, and its folder below ``out``.
        file: The mesh.
        out: The folder of all objects.
        options: What to render of it.
        renderer: The renderer that was chosen for all.
        stamp: Of the file as it was when the job was made.
    """

    id: str
    file: Path
    out: Path
    options: RenderOptions
    renderer: RendererName
    stamp: list[int] | None = None


def render_job(job: RenderJob) -> dict[str, Any]:
    """Render an object, or find it finished.

    Args:
        job: The object.

    Returns:
        ``views`` written now (0 when it was finished), seconds by part of the time, ``cpu``
        seconds, and the ``device`` and ``host`` that drew; JSON values.

    Raises:
        MeshError: The mesh cannot be used.
        RenderError: A view came out wrong, or the folder holds another rendering.
    """
    start, cpu = time.perf_counter(), used_cpu()
    watch = Stopwatch()
    with watch.part("load"):
        mesh = load_mesh(job.file, job.options.limits)
    folder, now = render_or_skip(mesh, job.out, job.options, job.renderer, job.id, watch)
    record = finished_record(folder) or {}
    device = str(record.get("renderer", {}).get("device", ""))
    seconds = time.perf_counter() - start
    watch.seconds["render"] = seconds - sum(watch.seconds.values())
    warning = software_on_gpu_node(job.renderer, device, node_has_gpu()) if now else ""
    return {
        "views": len(record.get("views", [])) if now else 0,
        "seconds": {part: round(watch.seconds.get(part, 0.0), 4) for part in PARTS},
        "cpu": round(used_cpu() - cpu, 4),
        "sha256": mesh.sha256,
        "device": device,
        "host": socket.gethostname(),
        "warning": _of_host(warning),
    }


class Question(NamedTuple):
    """Which renderer shall it be?

    Attributes:
        renderer: What the user asked for.
        options: What will be rendered.
    """

    renderer: RendererName
    options: RenderOptions


def choose_on_worker(question: Question) -> dict[str, Any]:
    """Decide which renderer to use, on a worker: the process that hands out work needs no GL.

    Args:
        question: What is asked for.

    Returns:
        ``name``, ``reason`` and ``warning``.

    Raises:
        RenderError: That renderer, or every renderer, does not work there.
    """
    choice = choose_renderer(question.renderer, question.options.cycles)
    warning = ""
    if choice.name == "pyrender":
        from data_prep.renderers import pyrender_

        warning = software_on_gpu_node(choice.name, pyrender_.device(), node_has_gpu())
    elif question.renderer == "auto" and node_has_gpu():
        warning = f"there is a GPU, but {choice.reason}"
    return {"name": choice.name, "reason": choice.reason, "warning": _of_host(warning)}


def _of_host(warning: str) -> str:
    return f"{socket.gethostname()}: {warning}" if warning else ""
