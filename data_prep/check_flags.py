"""Views that are sound geometry and poor training data all the same."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from equifeat.data.object_views import View
from equifeat.geometry.camera import invert, relative, rotation_angle_deg, transform
from equifeat.geometry.pixels import pixel_centers, resize

_THUMB = 16
_SAME_PICTURE = 1.0 / 255
_FLAT = 0.004  # mean gradient inside the mask, in a picture from 0 to 1
_BORDER = 0.02  # part of the border that the mask may touch
_HOLES = 0.5
_SAME_DEG, _SAME_SHIFT = 0.05, 1e-3


class FlagOptions(NamedTuple):
    """Limits of the flags.

    Attributes:
        tiny: Least part of the picture that the object should fill.
    """

    tiny: float = 0.02


class ViewFacts(NamedTuple):
    """What was measured in one view.

    Attributes:
        flags: Names of what is poor about it.
        thumb: Small grey picture, for finding duplicates.
        low: (3,) lower corner of the object's box in object coordinates, NaN where empty.
        high: (3,) upper corner.
    """

    flags: list[str]
    thumb: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def inspect_view(view: View, options: FlagOptions) -> ViewFacts:
    """Measure one view.

    Args:
        view: The view.
        options: Limits.

    Returns:
        Its facts; duplicates are found by `duplicates`.
    """
    flags = []
    mask, depth, image = view.mask, view.depth, view.image
    share = float(mask.float().mean())
    finite = bool(depth.isfinite().all()) and bool(image.isfinite().all())
    if not finite:
        flags.append("not finite")
    if not mask.any():
        flags.append("empty mask")
    else:
        if share < options.tiny:
            flags.append("tiny object")
        border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        if float(border.float().mean()) > _BORDER:
            flags.append("cropped object")
        inside = depth[mask]
        if float((inside <= 0).float().mean()) > _HOLES:
            flags.append("depth missing in mask")
        values = image[:, mask]
        if float(values.max()) < 8 / 255 or float(values.std(dim=1).max()) < 1 / 255:
            flags.append("blank colour")
        elif _gradient(image, mask) < _FLAT:
            flags.append("flat texture")
    thumb = resize(image.mean(0)[None, None], (_THUMB, _THUMB))[0, 0]
    low, high = _box(view)
    return ViewFacts(flags, thumb, low, high)


def duplicates(facts: list[ViewFacts], poses: torch.Tensor) -> dict[int, list[str]]:
    """Find views with the same pose or the same picture as an earlier one.

    Args:
        facts: One a view.
        poses: (V, 4, 4) cam_from_world.

    Returns:
        Flags by the index of the later view.
    """
    out: dict[int, list[str]] = {}
    eyes = invert(poses)[:, :3, 3]
    reach = float(eyes.std(dim=0).norm()) if len(eyes) > 1 else 1.0
    for i in range(1, len(facts)):
        angle = rotation_angle_deg(relative(poses[:i], poses[i])[:, :3, :3])
        near = (eyes[:i] - eyes[i]).norm(dim=-1) <= _SAME_SHIFT * max(reach, 1e-6)
        if bool(((angle < _SAME_DEG) & near).any()):
            out.setdefault(i, []).append("same pose as another view")
        thumbs = torch.stack([fact.thumb for fact in facts[:i]])
        if bool(((thumbs - facts[i].thumb).abs().amax(dim=(1, 2)) < _SAME_PICTURE).any()):
            out.setdefault(i, []).append("same picture as another view")
    return out


def longest_side(facts: list[ViewFacts]) -> float:
    """Return the longest side of the object's box over all views.

    Args:
        facts: One a view.

    Returns:
        Object units; 0 where nothing was seen.
    """
    low = np.array([fact.low.tolist() for fact in facts])
    high = np.array([fact.high.tolist() for fact in facts])
    seen = np.isfinite(low).all(axis=1)
    if not seen.any():
        return 0.0
    return float((high[seen].max(axis=0) - low[seen].min(axis=0)).max())


def _gradient(image: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean change from pixel to pixel where both belong to the object."""
    grey = image.mean(0)
    total, count = 0.0, 0
    for change, both in (
        ((grey[1:] - grey[:-1]).abs(), mask[1:] & mask[:-1]),
        ((grey[:, 1:] - grey[:, :-1]).abs(), mask[:, 1:] & mask[:, :-1]),
    ):
        total += float(change[both].sum())
        count += int(both.sum())
    return total / max(count, 1)


def _box(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """The box of the visible surface without its outermost thousandth, which may be noise."""
    there = view.mask & (view.depth > 0) & view.depth.isfinite()
    xy = pixel_centers(view.camera.size_hw)[there]
    if len(xy) < 20:
        nothing = torch.full((3,), float("nan"))
        return nothing, nothing
    step = max(len(xy) // 20_000, 1)
    points = view.camera.unproject(xy[::step], view.depth[there][::step])
    points = transform(invert(view.cam_from_world), points)
    bounds = torch.quantile(points, torch.tensor([0.001, 0.999]), dim=0)
    return bounds[0], bounds[1]
