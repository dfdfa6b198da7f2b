"""What the demo says: plain sentences, tables and pictures of one result."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from equifeat._version import __version__
from equifeat.data.views import ObjectViews, View
from equifeat.eval.equivariance import HasDense, SampledMap
from equifeat.eval.equivariance_result import EquivarianceResult, Score
from equifeat.eval.matching import nearest
from equifeat.geometry.camera import relative, rotation_angle_deg
from equifeat.geometry.covisibility import dense_correspondences, overlap
from equifeat.geometry.pixels import pixel_centers
from equifeat.metrics import box_normalizer
from equifeat.report import Picture, Table, write_report
from equifeat.viz import (
    Curve,
    Panel,
    curves_picture,
    match_picture,
    pca_picture,
    save_png,
    transfer_picture,
)

RAW, UNTRAINED = "raw ViT", "untrained model"
_PICTURED_OBJECTS, _PICTURED_VIEWS = 8, 4
# Views nearer than this look alike to any model.
_TELLING_ANGLE_DEG = 20.0


def _excludes_zero(score: Score) -> bool:
    return score.low > 0 or score.high < 0


def _change(result: EquivarianceResult, first: str, second: str) -> str:
    gain = result.difference(first, second)
    parts = []
    for metric in ("APE", "PCDP@.10"):
        score = gain[metric]
        before = result.summary(first)[metric].mean
        after = result.summary(second)[metric].mean
        if score.low != score.low:
            sure = "one object alone gives no interval"
        elif _excludes_zero(score):
            sure = f"95 % interval {score.low:+.2f} to {score.high:+.2f}, which excludes zero"
        else:
            sure = f"95 % interval {score.low:+.2f} to {score.high:+.2f}, which includes zero"
        parts.append(f"{metric} from {before:.2f} to {after:.2f} ({score.mean:+.2f}; {sure})")
    return " and ".join(parts)


def summary(result: EquivarianceResult, steps: Sequence[int]) -> list[str]:
    """Say in plain sentences what training did and what one step alone did.

    Args:
        result: Scores of the raw, the untrained and the trained models, in order.
        steps: Optimiser steps of the trained models.

    Returns:
        Sentences.
    """
    last = result.models[-1]
    objects = len({row.object_name for row in result.rows})
    lines = [
        f"On {objects} objects never seen in training, {last.removeprefix('after ')} on one object "
        f"take the raw ViT's {_change(result, RAW, last)}.",
        f"Against the untrained model the change is {_change(result, UNTRAINED, last)}.",
    ]
    same = all(score.mean == 0 for score in result.difference(RAW, UNTRAINED).values())
    lines.append(
        "The untrained model is exactly the raw ViT, so all of this is learned."
        if same
        else f"The untrained model alone takes {_change(result, RAW, UNTRAINED)}: that part is the "
        "random start, not learning."
    )
    if 1 in steps and len(steps) > 1:
        one = result.difference(UNTRAINED, "after 1 step")
        clear = _excludes_zero(one["APE"]) or _excludes_zero(one["PCDP@.10"])
        gain = one["APE"].mean < 0 and one["PCDP@.10"].mean > 0
        verdict = (
            "changes almost nothing that can be told from noise"
            if not clear
            else ("already helps a little" if gain else "does not help yet")
        )
        lines.append(
            f"One step alone {verdict}: against the untrained model, "
            f"{_change(result, UNTRAINED, 'after 1 step')}."
        )
    return lines


def _shared(obj: ObjectViews) -> Tensor:
    """(V, V) share of the surface of view j that view i sees, 0 where the view change is small."""
    shares = torch.zeros(len(obj), len(obj))
    for i, j in itertools.permutations(range(len(obj)), 2):
        view0, view1 = obj.view(i), obj.view(j)
        pose = relative(view0.cam_from_world, view1.cam_from_world)
        if float(rotation_angle_deg(pose[:3, :3])) >= _TELLING_ANGLE_DEG:
            found = dense_correspondences(
                view0.depth, view1.depth, view0.camera, view1.camera, pose
            )
            shares[j, i] = overlap(found, view0.depth)
    return shares


def _pictured(held_out: Sequence[ObjectViews]) -> tuple[ObjectViews, list[int]]:
    """Choose the object and views that have most in common, by geometry alone."""
    best, chosen = -1.0, (held_out[0], [0])
    for obj in held_out[:_PICTURED_OBJECTS]:
        shares, others = _shared(obj).sort(dim=1, descending=True)
        top = shares[:, : _PICTURED_VIEWS - 1].sum(1)
        first = int(top.argmax())
        if float(top[first]) > best:
            best = float(top[first])
            near = others[first, : _PICTURED_VIEWS - 1].tolist()
            chosen = obj, [first, *(i for i in near if i != first)]
    return chosen


def _matches(obj: ObjectViews, pair: tuple[int, int], model: HasDense, title: str) -> Any:
    view0, view1 = (obj.view(i) for i in pair)
    pose = relative(view0.cam_from_world, view1.cam_from_world)
    truth = dense_correspondences(view0.depth, view1.depth, view0.camera, view1.camera, pose)
    centers = pixel_centers((view0.depth.shape[0], view0.depth.shape[1]))
    xy0, xy1 = centers[truth.covisible], truth.xy[truth.covisible]
    keep = torch.linspace(0, len(xy0) - 1, min(120, len(xy0))).long()
    xy0, xy1 = xy0[keep], xy1[keep]
    targets = pixel_centers((view1.depth.shape[0], view1.depth.shape[1]))[view1.mask]
    with torch.no_grad():
        d0 = model.dense(view0.image[None]).sample(xy0[None])[0]
        d1 = model.dense(view1.image[None]).sample(targets[None])[0]
    found = targets[nearest(d0, d1).matches0.cpu()]
    errors = (found - xy1).norm(dim=-1) / box_normalizer(view1.mask)
    return match_picture(view0.image, view1.image, xy0, found, errors, title=title)


def _features(
    views: Sequence[View], models: Mapping[str, HasDense], names: Sequence[str]
) -> dict[str, list[SampledMap]]:
    return {name: [models[name].dense(view.image[None]) for view in views] for name in names}


def _curves(
    result: EquivarianceResult, steps: Sequence[int], losses: Mapping[int, float]
) -> list[Panel]:
    at = [0, *steps]
    panels = [
        Panel(
            "Training loss",
            "optimiser step",
            "1 − SmoothAP",
            {
                "loss": Curve(list(losses), list(losses.values())),
            },
        )
    ]
    for metric in ("APE", "PCDP@.10"):
        scores = [result.summary(name)[metric] for name in result.models[1:]]
        panels.append(
            Panel(
                f"Held-out {metric}",
                "optimiser step",
                "%",
                {
                    metric: Curve(
                        at,
                        [s.mean for s in scores],
                        [s.low for s in scores],
                        [s.high for s in scores],
                    ),
                },
            )
        )
    return panels


def demo_report(
    out: Path,
    result: EquivarianceResult,
    models: Mapping[str, HasDense],
    steps: Sequence[int],
    losses: Mapping[int, float],
    train: ObjectViews,
    held_out: Sequence[ObjectViews],
    details: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write report.html and the PNG files.

    Args:
        out: Folder of the demo.
        result: Scores of all models.
        models: The models by name, in the order of the result.
        steps: Optimiser steps of the trained models.
        losses: Training loss by step.
        train: The training object.
        held_out: The held-out objects.
        details: Options of the demo.
        seconds: Time until the report.
    """
    last = result.models[-1]
    names = [RAW, last]
    obj, indices = _pictured(held_out)
    pair = (indices[0], indices[-1] if len(indices) == 1 else indices[1])
    views = [obj.view(i) for i in indices]
    features = _features(views, models, names)
    pictures = {
        "transfer": Picture(
            "Correspondence transfer",
            "View 0 of a held-out object is coloured by object coordinates. Every pixel of the "
            "other views takes the colour of the most similar feature in view 0; a perfect model "
            "would give the row of the truth. Pale: surface that view 0 does not see.",
            transfer_picture(views, features),
        ),
        "pca": Picture(
            "Principal components of the features",
            "The same part of the object should keep its colour from view to view.",
            pca_picture(views, features),
        ),
    }
    for key, name in (("matches_raw", RAW), ("matches_trained", last)):
        pictures[key] = Picture(
            f"Matches, {name}",
            "Lines join covisible pixels of view 0 to their nearest features in view 1; green is "
            "right, red is off by a fifth of the object's box or more.",
            _matches(obj, pair, models[name], name),
        )
    pictures["curves"] = Picture(
        "Loss and metrics",
        "The loss of each training pair, and the held-out metrics with their 95 % intervals.",
        curves_picture(_curves(result, steps, losses)),
    )
    for key, picture in pictures.items():
        assert isinstance(picture.image, Image.Image)
        save_png(picture.image, out / f"{key}.png")
    tables = [
        Table("Held-out objects", result.cells(), result.caption()),
        Table(
            "Change against the raw ViT",
            result.difference_cells(RAW),
            "Paired over objects; a gain is negative for APE and positive for PCDP.",
        ),
        Table(
            "Change against the untrained model",
            result.difference_cells(UNTRAINED),
            "Paired over objects.",
        ),
        Table(
            "PCDP@.10 by view change",
            result.bin_cells("PCDP@.10"),
            "Angle of the relative rotation of the two cameras.",
        ),
    ]
    how = {key: str(value) for key, value in details.items()} | {
        "training object": f"{train.name}, {len(train)} views",
        "held-out objects": ", ".join(o.name for o in held_out),
        "seconds before this report": f"{seconds:.0f}",
        "equifeat, torch, Python": f"{__version__}, {torch.__version__}, "
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    write_report(
        out / "report.html",
        "equifeat: one object, finetuned and measured",
        summary(result, steps),
        tables,
        list(pictures.values()),
        how,
    )
