"""`equifeat check-views`: find faults in posed views before training does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data_prep.capture import CaptureKind, CaptureOptions, CaptureViews, open_captures
from data_prep.capture_conventions import PoseKind
from data_prep.capture_write import write_views
from data_prep.check_flags import FlagOptions
from data_prep.check_object import Finding, check_object
from data_prep.check_pictures import reprojection, sheet
from equifeat.data.object_views import ObjectViews
from equifeat.data.views import open_views
from equifeat.errors import ImageError, ViewsError
from equifeat.files import atomic_file
from equifeat.progress import progress

REPORT_FORMAT, REPORT_VERSION = "equifeat-check", 1
_DIAGNOSED = 5  # objects; what is wrong with these is wrong with the others
_ON_SHEET = 40


def check_views_command(
    folders: list[Path],
    out: Path | None = None,
    layout: CaptureKind = "auto",
    axes: str = "",
    pose: PoseKind | None = None,
    columns: bool = False,
    left_handed: bool = False,
    depth_unit: str = "auto",
    depth: Literal["z", "ray"] = "z",
    pixels: Literal["corner", "center"] = "corner",
    k_size: str = "",
    pairs: int = 24,
    tiny: float = 0.02,
    strict: bool = False,
    write: Path | None = None,
) -> str:
    """Find faults in posed views and write a report, a contact sheet and a reprojection.

    Args:
        folders: View folders of any layout, packed ones included, or captures of one's own.
        out: Folder of the report; by default FOLDER_check beside the first folder.
        layout: "views" for what the project reads itself, "nerf" (transforms.json), "colmap" (with
            depth) or "plain" (pictures, depth, poses, intrinsics); "auto" looks.
        axes: Camera axes of the poses: opencv, opengl, blender, pytorch3d, unity, ros or three
            letters such as RDF; by default the layout's own.
        pose: cam_from_world or world_from_cam; by default the layout's own.
        columns: Whether the matrices are stored column after column.
        left_handed: Whether the world of the poses is left-handed.
        depth_unit: m, cm, mm or units of the poses a step of the depth files; auto is mm for
            integers and the unit of the poses for floats.
        depth: "z", or "ray" where depth is the distance along the ray.
        pixels: "corner" where K counts from the picture's corner, "center" where it counts from
            the first pixel's centre.
        k_size: WIDTHxHEIGHT of the pictures that K is for; by default the pictures themselves.
        pairs: Pairs of views compared in each object, at most.
        tiny: Least part of a picture that the object should fill.
        strict: Whether a flag is an error too.
        write: Folder that receives each capture as a view folder for training, if it is sound.

    Returns:
        A summary.

    Raises:
        ViewsError: The geometry is wrong: the first fault, in one sentence.
    """
    if pairs < 1:
        raise ViewsError(f"pairs = {pairs}: compare at least one pair")
    if not 0 <= tiny < 1:
        raise ViewsError(f"tiny = {tiny}: give a part of the picture, from 0 to below 1")
    options = CaptureOptions(
        layout, axes, pose, columns, left_handed, depth_unit, depth, pixels, k_size
    )
    if not folders:
        raise ViewsError("no folder to check: give one")
    folder = Path(folders[0])
    objects = [views for place in folders for views in _open(Path(place), options)]
    if write is not None and not all(isinstance(views, CaptureViews) for views in objects):
        raise ViewsError(f"{folder}: holds view folders already; --write is for captures")
    out = out or folder.resolve().with_name(f"{folder.resolve().name}_check")
    findings = check_objects(objects, pairs, FlagOptions(tiny))
    _write_report(out, folder, objects, findings)
    text = _summary(findings, out)
    _raise_first(findings, strict, text, out)
    if write is not None:
        written = [write_views(v, Path(write)) for v in objects if isinstance(v, CaptureViews)]
        text += f"\nwrote {len(written)} view folder{'s' * (len(written) > 1)} to {write}"
    return text


def check_objects(
    objects: Sequence[ObjectViews], pairs: int = 24, flags: FlagOptions | None = None
) -> list[Finding]:
    """Check objects one after the other.

    Args:
        objects: Their views.
        pairs: Pairs of views compared in each, at most.
        flags: Limits of the flags.

    Returns:
        One finding an object.
    """
    findings: list[Finding] = []
    wrong = 0
    for views in progress(objects, "check"):
        try:
            found = check_object(views, pairs, flags or FlagOptions(), diagnose=wrong < _DIAGNOSED)
        except ImageError as error:
            found = Finding(views.name, views.where, len(views), (0, 0), problem=str(error))
        wrong += bool(found.problem)
        findings.append(found)
    return findings


def _open(folder: Path, options: CaptureOptions) -> Sequence[ObjectViews]:
    if not folder.is_dir():
        raise ViewsError(f"{folder}: no such folder; give a folder of views or a capture")
    if options.kind == "views":
        return open_views(folder)
    if options.kind != "auto":
        captures = open_captures(folder, options)
        if not captures:
            raise ViewsError(f"{folder}: holds no capture of the layout {options.kind}")
        return captures
    try:
        found = open_views(folder)
    except ViewsError as error:
        captures = open_captures(folder, options)
        if not captures:
            raise ViewsError(f"{error} (nor is it a capture: docs/captures.md)") from error
        return captures
    # Real captures that training reads by their sparse points may have depth as well.
    if any(views.tracks is not None for views in found) and _has_depth(folder):
        return open_captures(folder, options)
    return found


def _has_depth(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in ("depth", "depths", "stereo/depth_maps"))


def _write_report(
    out: Path, folder: Path, objects: Sequence[ObjectViews], findings: list[Finding]
) -> None:
    sound = sum(1 for f in findings if not f.problem)
    report = {
        "format": REPORT_FORMAT,
        "version": REPORT_VERSION,
        "folder": str(folder),
        "objects": len(findings),
        "sound": sound,
        "flagged_views": sum(len(f.flags) for f in findings),
        "findings": [f.record() for f in findings],
    }
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    readable = [(v, f) for v, f in zip(objects, findings, strict=True) if f.size_wh != (0, 0)]
    # Wrong ones first, then flagged ones, then a look at the others.
    ranked = sorted(readable, key=lambda item: (not item[1].problem, not item[1].flags))
    rows = [(views, found.flags, _note(found)) for views, found in ranked[:_ON_SHEET]]
    if rows:
        sheet(rows, out / "contact.png")
    compared = [(v, f) for v, f in readable if f.worst is not None and f.before is not None]
    if compared:
        views, found = min(
            compared, key=lambda item: item[1].before.consistency if item[1].before else 1.0
        )
        assert found.worst is not None
        reprojection(views, found.worst, out / "reprojection.png", f"{found.name}: {_note(found)}")


def _note(found: Finding) -> str:
    if found.problem:
        return found.fixes[0].wrong if found.fixes else found.problem.split(";")[0]
    return "; ".join(found.notes) or "ok"


def _summary(findings: list[Finding], out: Path) -> str:
    wrong = [f for f in findings if f.problem]
    flagged = [f for f in findings if f.flags or f.notes]
    lines = [f"{len(findings) - len(wrong)} of {len(findings)} objects fit together"]
    lines += [f"  wrong: {f.name}: {f.problem}" for f in wrong[:10]]
    counts: dict[str, int] = {}
    for found in findings:
        for names in found.flags.values():
            for name in names:
                counts[name] = counts.get(name, 0) + 1
    lines += [f"  flag: {name}: {n} views" for name, n in sorted(counts.items())]
    lines += [f"  note: {f.name}: {note}" for f in flagged[:10] for note in f.notes]
    scored = [f.before for f in findings if f.before]
    if scored:
        agree = sum(s.consistency for s in scored) / len(scored)
        distance = sum(s.residual for s in scored) / len(scored)
        lines.append(
            f"  reprojected depth: {agree:.1%} of the compared points agree, median distance "
            f"{distance:.2%} of the object's size"
        )
    lines.append(f"report: {out / 'report.json'}, contact.png, reprojection.png")
    return "\n".join(lines)


def _raise_first(findings: list[Finding], strict: bool, text: str, out: Path) -> None:
    first = next((f for f in findings if f.problem), None)
    if first:
        wrong = sum(1 for f in findings if f.problem)
        others = f"; {wrong - 1} more objects are wrong" if wrong > 1 else ""
        raise ViewsError(f"{first.where}: {first.problem}{others}; see {out / 'report.json'}")
    flagged = next((f for f in findings if f.flags or f.notes), None)
    if strict and flagged:
        i, names = next(iter(flagged.flags.items()), (0, flagged.notes))
        raise ViewsError(
            f"{flagged.where}: view {i}: {names[0]}; leave such views out, or check without "
            f"--strict (see {out / 'report.json'})"
        )
