"""Check the geometry and the views of one object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.capture import CaptureViews, background_known, names_of
from data_prep.capture_conventions import Convention
from data_prep.check_case import Case, Fix
from data_prep.check_flags import FlagOptions, duplicates, inspect_view, longest_side
from data_prep.check_reproject import CEILING, Score
from data_prep.check_search import Judge, search
from data_prep.check_surface import Surface, make_surface
from equifeat.data.object_views import ObjectViews
from equifeat.geometry.camera import Camera, transform

_MOST_PIXELS = 2.0  # median error of a track before a sparse capture counts as wrong
_ODD_VIEW = 0.5
_SIDES = (0.5, 2.0)


@dataclass
class Finding:
    """What was found out about one object.

    Attributes:
        name: The object.
        where: Where it is.
        views: How many.
        size_wh: Width and height of the first view.
        before: Score as given, None where nothing could be compared.
        after: Score with the corrections.
        fixes: Corrections that make the views fit, in the order in which to mend them.
        problem: What is wrong with the geometry, a sentence; empty when nothing is.
        flags: Flags by view.
        notes: Flags of the whole object.
        pairs: Pairs of views that were compared.
        worst: The pair that fits worst.
        order: Which pose belongs to which view, where they were in disorder.
    """

    name: str
    where: str
    views: int
    size_wh: tuple[int, int]
    before: Score | None = None
    after: Score | None = None
    fixes: list[Fix] = field(default_factory=list)
    problem: str = ""
    flags: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    worst: tuple[int, int] | None = None
    order: list[int] | None = None

    def record(self) -> dict[str, Any]:
        """Return what goes to report.json."""
        out = dataclasses.asdict(self)
        out["before"] = self.before._asdict() if self.before else None
        out["after"] = self.after._asdict() if self.after else None
        out["fixes"] = [fix._asdict() for fix in self.fixes]
        out["flags"] = {str(i): names for i, names in sorted(self.flags.items())}
        return out


def check_object(views: ObjectViews, pairs: int, options: FlagOptions, diagnose: bool) -> Finding:
    """Check one object.

    Args:
        views: Its views.
        pairs: How many pairs of views to compare at most.
        options: Limits of the flags.
        diagnose: Whether to look for what is wrong where views do not fit together.

    Returns:
        What was found.
    """
    h, w = views.camera(0).size_hw
    finding = Finding(views.name, views.where, len(views), (int(w), int(h)))
    facts = [inspect_view(views.view(i), options) for i in range(len(views))]
    finding.flags = {i: list(fact.flags) for i, fact in enumerate(facts) if fact.flags}
    for i, flags in duplicates(facts, views.cam_from_world).items():
        finding.flags.setdefault(i, []).extend(flags)
    if views.tracks is not None:
        _check_tracks(views, finding)
        return finding
    usable = [i for i, fact in enumerate(facts) if bool(fact.low.isfinite().all())]
    # A mask that holds a scrap of the object calls the rest of it background.
    whole = [i for i in usable if "tiny object" not in facts[i].flags]
    usable = whole if len(whole) >= max(2, len(usable) / 2) else usable
    _check_geometry(views, finding, usable, pairs, diagnose)
    side = longest_side(facts)
    if not isinstance(views, CaptureViews) and side and not _SIDES[0] <= side <= _SIDES[1]:
        finding.notes.append(
            f"the object's longest side is {side:.3g}, not about 1: radii of the loss do not fit"
        )
    return finding


def _check_geometry(
    views: ObjectViews, finding: Finding, usable: list[int], pairs: int, diagnose: bool
) -> None:
    known = background_known(views)
    K = views.K_exact if isinstance(views, CaptureViews) else views.K.double().numpy()

    def surface(i: int) -> Surface | None:
        return make_surface(views.view(i), known)

    judge = Judge(surface, usable, pairs)
    judge.usable = [i for i in usable if judge.surface(i) is not None]
    if len(judge.usable) < 2:
        finding.problem = (
            f"only {len(judge.usable)} of its {len(views)} views show enough of the object to be "
            "compared; check depth and masks"
        )
        return
    case = _case(views, K)
    if diagnose:
        verdict = search(judge, case, names_of(views))
        finding.before, finding.after, finding.pairs = verdict.before, verdict.after, verdict.pairs
        finding.fixes = list(verdict.case.fixes)
        finding.order = list(verdict.case.order) if verdict.case.order else None
    else:
        finding.pairs = judge.pairs(case)
        finding.before = finding.after = judge.scores([case], finding.pairs)[0][0]
    finding.problem = _problem(finding, case, isinstance(views, CaptureViews))
    by_pair = [(judge.scores([case], [pair])[0][0], pair) for pair in finding.pairs]
    seen = [(s, pair) for s, pair in by_pair if s.points]
    if seen:
        finding.worst = min(seen, key=lambda item: item[0].consistency * min(item[0].agree, 0.2))[1]
    if not finding.problem:
        _odd_views(by_pair, finding)


def _case(views: ObjectViews, K: NDArray[Any]) -> Case:
    sizes = np.array([views.camera(i).size_hw[::-1] for i in range(len(views))], dtype=np.float64)
    if isinstance(views, CaptureViews):
        ray = views.options.depth == "ray"
        return Case(views.given, views.convention, K, sizes, views.unit, ray)
    return Case(views.cam_from_world.double().numpy(), Convention(), K, sizes)


def _problem(finding: Finding, case: Case, is_capture: bool) -> str:
    """The sentence about the geometry: the first thing that is wrong, or nothing."""
    before, after = finding.before, finding.after
    assert before is not None
    assert after is not None
    if finding.fixes:
        first, *rest = finding.fixes
        remedy = first.remedy if is_capture else "write the views anew (docs/data.md)"
        more = "".join(f"; then {fix.wrong}: {fix.remedy}" for fix in rest)
        return (
            f"{first.wrong}; {remedy}{more} ({before.consistency:.0%} of the compared points "
            f"agreed, {after.consistency:.0%} do with the correction; median distance "
            f"{_percent(before)} of the object's size before, {_percent(after)} after)"
        )
    if not before.consistent:
        return (
            f"the views do not fit together ({before.consistency:.0%} of the compared points "
            "agree) and no single convention mends it; check that every picture has its own depth "
            "and pose, and that the poses are precise"
        )
    mirrored = float(np.linalg.det(case.poses()[0, :3, :3])) < 0
    if mirrored and not case.convention.expects_mirror:
        return (
            "the world of the poses is mirrored (their determinant is -1): left and right are "
            "exchanged in the object; give --left-handed"
        )
    if not mirrored and case.convention.expects_mirror:
        return (
            f"the poses are right-handed, but --axes {case.convention.axes} and --left-handed say "
            "otherwise; leave --left-handed out or give other --axes"
        )
    return ""


def _percent(score: Score) -> str:
    return f"{score.residual:.2%}" if score.residual < CEILING else f"over {CEILING:.0%}"


def _odd_views(by_pair: list[tuple[Score, tuple[int, int]]], finding: Finding) -> None:
    """Flag single views that fit to none of the others."""
    of_view: dict[int, list[float]] = {}
    for score, pair in by_pair:
        if score.agree > 0.02 or score.consistency < _ODD_VIEW:
            for i in pair:
                of_view.setdefault(i, []).append(score.consistency)
    best = {i: max(values) for i, values in of_view.items()}
    for i, value in best.items():
        if value < _ODD_VIEW:
            finding.flags.setdefault(i, []).append("does not fit the other views")


def _check_tracks(views: ObjectViews, finding: Finding) -> None:
    """Sparse captures have points instead of depth: project them where they were seen."""
    tracks = views.tracks
    assert tracks is not None
    medians = {}
    for i in range(len(views)):
        if len(tracks.xy[i]) < 8:
            continue
        pose = views.cam_from_world[i].double()
        camera = Camera(views.K[i].double(), views.camera(i).size_hw)
        points = transform(pose, tracks.points3d[tracks.point_ids[i]].double())
        error = (camera.project(points) - tracks.xy[i].double()).norm(dim=-1)
        medians[i] = float(torch.nan_to_num(error, nan=1e6).median())
    if not medians:
        finding.problem = "no view has 8 tracked points, so nothing can be compared"
        return
    middle = float(np.median(list(medians.values())))
    finding.notes.append(f"sparse points, median reprojection error {middle:.2f} px")
    if middle > _MOST_PIXELS:
        finding.problem = (
            f"the tracked points project {middle:.1f} px away from where they were seen; check the "
            "poses and K"
        )
    for i, value in medians.items():
        if value > 5 * max(middle, 0.5):
            finding.flags.setdefault(i, []).append("does not fit the other views")
