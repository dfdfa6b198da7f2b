"""Score the estimated poses of one image as BOP does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equifeat.data.bop import BopImage, BopObject
from equifeat.data.triangles import Triangles
from equifeat.geometry.camera import transform
from equifeat.geometry.pixels import SizeHW
from equifeat.geometry.raster import rasterize_depth
from equifeat.metrics.bop import FRACTIONS, PIXELS, add, adds, localized, mspd, mssd, vsd

METRICS = ("AR", "AR_VSD", "AR_MSSD", "AR_MSPD", "ADD(-S)@.1d")
# MSPD's thresholds are for images of this width.
_WIDTH = 640.0


class ScoredObject(NamedTuple):
    """An object model as scoring needs it.

    Attributes:
        surface: Its triangles, mm.
        info: Diameter and symmetries.
        symmetries: (S, 4, 4) discretised.
    """

    surface: Triangles
    info: BopObject
    symmetries: Tensor


class SceneDepth(NamedTuple):
    """What VSD sees.

    Attributes:
        depth: (H, W) measured z-depth, mm.
        delta: Tolerance of the visibility test, mm.
    """

    depth: Tensor
    delta: float


def valid_instances(image: BopImage, targets: Mapping[int, int]) -> list[int]:
    """Return which instances count: of each target object the most visible ones.

    Args:
        image: The image.
        targets: By object, how many instances are to be found.

    Returns:
        Indices into the image's instances, ascending.
    """
    left, out = dict(targets), []
    order = sorted(
        range(len(image.objects)), key=lambda i: image.objects[i].visib_fract, reverse=True
    )
    for i in order:
        obj = image.objects[i].obj_id
        if left.get(obj, 0) > 0:
            left[obj] -= 1
            out.append(i)
    return sorted(out)


def score_object(
    image: BopImage,
    instances: Sequence[int],
    poses: Tensor,
    scores: Tensor,
    model: ScoredObject,
    size_hw: SizeHW,
    scene: SceneDepth | None,
) -> list[dict[str, float]]:
    """Score the estimates of one object in one image.

    Args:
        image: The image.
        instances: Its valid instances of the object.
        poses: (E, 4, 4) estimates.
        scores: (E,) their confidences.
        model: The object.
        size_hw: Height and width of the image.
        scene: For VSD; without it AR_VSD and AR are NaN.

    Returns:
        For each instance, by name of `METRICS`, the percentage of thresholds it is found at.
    """
    truths = [image.objects[i].cam_from_object for i in instances]
    diameter, points = model.info.diameter, model.surface.vertices
    shape = (len(poses), len(truths))
    surface, projection = torch.zeros(shape).double(), torch.zeros(shape).double()
    average, visible = torch.zeros(shape).double(), torch.ones(*shape, len(FRACTIONS)).double()
    distance = adds if model.info.symmetric else add
    drawn_true = [_draw(model, pose, image, size_hw) for pose in truths] if scene else []
    for e, pose in enumerate(poses):
        drawn = _draw(model, pose, image, size_hw) if scene else None
        for g, truth in enumerate(truths):
            surface[e, g] = mssd(pose, truth, points, model.symmetries) / diameter
            pixels = mspd(pose, truth, points, model.symmetries, image.K)
            projection[e, g] = pixels * _WIDTH / size_hw[1]
            average[e, g] = distance(pose, truth, points) / diameter
            if scene is not None and drawn is not None:
                visible[e, g] = vsd(
                    drawn, drawn_true[g], scene.depth, image.K, diameter, delta=scene.delta
                )
    recall = {
        "AR_MSSD": _recall([localized(surface, scores, th) for th in FRACTIONS]),
        "AR_MSPD": _recall([localized(projection, scores, th) for th in PIXELS]),
        "AR_VSD": _recall(
            [
                localized(visible[..., tau], scores, th)
                for tau in range(len(FRACTIONS))
                for th in FRACTIONS
            ]
        ),
        "ADD(-S)@.1d": _recall([localized(average, scores, 0.1)]),
    }
    if scene is None:
        recall["AR_VSD"] = torch.full((len(truths),), torch.nan).double()
    recall["AR"] = (recall["AR_VSD"] + recall["AR_MSSD"] + recall["AR_MSPD"]) / 3.0
    return [{name: float(recall[name][g]) for name in METRICS} for g in range(len(truths))]


def _recall(found: list[Tensor]) -> Tensor:
    return 100.0 * torch.stack(found).double().mean(dim=0)


def _draw(model: ScoredObject, pose: Tensor, image: BopImage, size_hw: SizeHW) -> Tensor:
    # K as it is: the toolkit's renderers have OpenGL's pixels, whose first centre is (0.5, 0.5)
    corners = transform(pose.double(), model.surface.vertices)
    return rasterize_depth(corners, model.surface.faces, image.K, size_hw)
