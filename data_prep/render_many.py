"""Many meshes to folders of views, each remembered in OUT/manifest.sqlite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.farm import Engine, FarmOptions, Result, Task, call_once, open_engine, run_tasks
from data_prep.farm_render import PARTS, Question, RenderJob, choose_on_worker, render_job
from data_prep.manifest import Manifest, Record
from data_prep.mesh_files import check_names, named_by_stem
from data_prep.render_object import RenderOptions
from data_prep.render_summary import ObjectReport, RenderSummary
from data_prep.renderers import RendererName
from data_prep.view_folder import remove_leftovers

MANIFEST = "manifest.sqlite"


def render_many(
    meshes: Sequence[str | Path] | Mapping[str, Path],
    out_dir: str | Path,
    options: RenderOptions | None = None,
    renderer: RendererName = "auto",
    progress: Callable[[ObjectReport], None] | None = None,
    farm: FarmOptions | None = None,
) -> RenderSummary:
    """Render many files; one that fails does not stop the others.

    Args:
        meshes: Mesh files, whose stems name the objects, or file by object name.
        out_dir: The parent of the objects' folders; it belongs to one run at a time.
        options: Size, viewpoints, normals, overwrite.
        renderer: "auto" or a renderer's name; decided once for all objects.
        progress: Called after each object.
        farm: How the work is spread; by default one after another in this process.

    Returns:
        A summary; its counts and failures are those of all the meshes given, whenever rendered.

    Raises:
        RenderError: No renderer works here, or two meshes would share a folder.
        ManifestError: The folder was rendered with other settings, or another run is at it.
    """
    with open_run(meshes, out_dir, options, renderer, farm) as run:
        for report in run.reports:
            if progress is not None:
                progress(report)
        return run.summary


class RenderRun(NamedTuple):
    """A run that is about to begin.

    Attributes:
        summary: Renderer and warnings; the rest grows with the reports.
        reports: Does the work; one report an object.
        total: Number of objects.
    """

    summary: RenderSummary
    reports: Iterator[ObjectReport]
    total: int


@contextmanager
def open_run(
    meshes: Sequence[str | Path] | Mapping[str, Path],
    out_dir: str | Path,
    options: RenderOptions | None = None,
    renderer: RendererName = "auto",
    farm: FarmOptions | None = None,
) -> Iterator[RenderRun]:
    """Open workers and manifest for `render_many`.

    Args:
        meshes: Mesh files, whose stems name the objects, or file by object name.
        out_dir: The parent of the objects' folders.
        options: Size, viewpoints, normals, overwrite.
        renderer: "auto" or a renderer's name.
        farm: How the work is spread.

    Yields:
        The run.
    """
    if isinstance(meshes, Mapping):
        objects = {name: Path(file) for name, file in meshes.items()}
    else:
        objects = named_by_stem(map(Path, meshes))
    check_names(objects)
    out, options, farm = Path(out_dir), options or RenderOptions(), farm or FarmOptions()
    path_traced = renderer == "cycles" and options.cycles.device == "gpu"
    engine = open_engine(farm, gpus=renderer in ("auto", "pyrender") or path_traced)
    try:
        choice = call_once(choose_on_worker, Question(renderer, options), engine)
        settings = {"renderer": choice["name"], **options.record()}
        with Manifest(out / MANIFEST, "render", settings, options.overwrite) as manifest:
            # this run alone holds the manifest: what lies about is nobody's
            remove_leftovers(out, others=True)
            summary = RenderSummary(renderer=choice["name"], reason=choice["reason"])
            summary.warn(choice["warning"])
            work = _Work(objects, out, options, choice["name"], farm, manifest)
            try:
                yield RenderRun(summary, _counted(work, engine, summary), len(objects))
            finally:
                # while the manifest is still ours: what limits and crashes left, on any machine
                engine.close()
                remove_leftovers(out, others=True)
    finally:
        engine.close()


class _Work(NamedTuple):
    """What a run works on."""

    objects: dict[str, Path]
    out: Path
    options: RenderOptions
    renderer: RendererName
    farm: FarmOptions
    manifest: Manifest


def _counted(work: _Work, engine: Engine, summary: RenderSummary) -> Iterator[ObjectReport]:
    start = time.perf_counter()
    for report in _reports(work, engine):
        summary.add(report)
        summary.seconds = time.perf_counter() - start
        yield report
    summary.seconds = time.perf_counter() - start


def _reports(work: _Work, engine: Engine) -> Iterator[ObjectReport]:
    todo = []
    for name, file in work.objects.items():
        known = _known(work, name, file)
        if known is None:
            todo.append(name)
        else:
            yield known
    jobs = (Task(name, _job(work, name)) for name in todo)
    for result in run_tasks(render_job, jobs, engine, work.farm.retries):
        yield _remember(work, result)


def _job(work: _Work, name: str) -> RenderJob:
    file = work.objects[name]
    return RenderJob(name, file, work.out, work.options, work.renderer, _stamp(file))


def _known(work: _Work, name: str, file: Path) -> ObjectReport | None:
    """Report an object that needs no work; None for one that does."""
    row = work.manifest.get(name)
    if row is None or work.options.overwrite:
        return None
    if row.info.get("stamp") != _stamp(file):
        return None  # the source changed, or was touched: the worker compares its content
    if row.status == "ok":
        folder = work.out / name
        if not (folder / "views.json").is_file():
            return None
        return ObjectReport(str(file), "skipped", folder, 0, 0.0)
    if work.farm.retry_failed:
        return None
    kind = str(row.info.get("kind", ""))
    return ObjectReport(str(file), "failed", None, 0, 0.0, row.why, kind, earlier=True)


def _remember(work: _Work, result: Result) -> ObjectReport:
    """Write an object's row and report it."""
    job: RenderJob = result.task.payload
    name, file, reply = job.id, job.file, result.reply
    row = work.manifest.get(name)
    attempts = result.attempts + (row.attempts if row else 0)
    info: dict[str, Any] = {"stamp": job.stamp, "peak": reply.peak}
    if reply.fault is not None:
        why = reply.fault.why
        if file.name not in why:
            why = f"{file}: {why}"
        info["kind"] = reply.fault.kind
        work.manifest.put(Record(name, "failed", why, attempts, info))
        return ObjectReport(
            str(file), "failed", None, 0, 0.0, why, reply.fault.kind, peak=reply.peak
        )
    value = reply.value or {}
    work.manifest.put(Record(name, "ok", "", attempts, {**info, **value}))
    split = {part: value["seconds"][part] for part in PARTS}
    return ObjectReport(
        str(file),
        "done" if value["views"] else "skipped",
        work.out / name,
        value["views"],
        sum(split.values()),
        split=split,
        cpu=value["cpu"],
        peak=reply.peak,
        warning=value["warning"],
    )


def _stamp(file: Path) -> list[int] | None:
    """Return what changes with a file's content, without reading it."""
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
