"""One picture of a pair of held-out views: components, transfer and matches of some models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from equifeat.data.views import ObjectViews
from equifeat.draw import GAP, PAPER
from equifeat.eval.equivariance import HasDense, match_points
from equifeat.eval.equivariance_result import EquivarianceResult
from equifeat.viz import match_picture, pca_picture, transfer_picture

# Nearer views look alike to any model, farther ones have little in common.
_TELLING_ANGLE_DEG = 30.0


def telling_pair(result: EquivarianceResult) -> tuple[str, int, int]:
    """Choose the pair to draw by geometry alone, so that it is the same in every round.

    Args:
        result: Scores of any model.

    Returns:
        Name of the object, view 0, view 1.
    """
    best = min(result.rows, key=lambda row: abs(row.view_change_deg - _TELLING_ANGLE_DEG))
    return best.object_name, best.view0, best.view1


def watch_picture(
    models: Mapping[str, HasDense],
    obj: ObjectViews,
    pair: tuple[int, int],
    *,
    title: str,
    device: str,
    resolution: int | None = None,
    cell: int = 224,
) -> Image.Image:
    """Draw how models see a pair of views.

    Args:
        models: Models by name.
        obj: The object.
        pair: Indices of view 0 and view 1.
        title: Heading.
        device: Where the models are.
        resolution: Patches on the longer side of the models' input.
        cell: Side of a cell in pixels.

    Returns:
        Principal components and matches; beside them the transfer, where there is depth.
    """
    views = [obj.view(i) for i in pair]
    features = {
        name: [model.dense(v.image[None].to(device), resolution=resolution) for v in views]
        for name, model in models.items()
    }
    left = [pca_picture(views, features, cell=cell, title=title)]
    right = [transfer_picture(views, features, cell=cell)] if obj.tracks is None else []
    matches = match_points(models, obj, pair, resolution=resolution, device=device)
    left += [
        match_picture(
            views[0].image,
            views[1].image,
            found.xy0,
            found.found,
            found.errors,
            title=f"Matches, {name}",
            height=cell,
            max_lines=40,
        )
        for name, found in matches.items()
    ]
    return _columns([left, right])


def _columns(columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
    filled = [column for column in columns if column]
    width = sum(max(part.width for part in column) + GAP for column in filled)
    page = Image.new("RGB", (width, max(sum(p.height for p in c) for c in filled)), PAPER)
    x = 0
    for column in filled:
        y = 0
        for part in column:
            page.paste(part, (x, y))
            y += part.height
        x += max(part.width for part in column) + GAP
    return page
