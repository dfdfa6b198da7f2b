"""Pictures: correspondence transfer, PCA of features, match lines, curves.

Every function returns a PIL image with its own titles and legend, and needs no display: grids are
drawn by NumPy and PIL, curves by matplotlib's Agg canvas without pyplot, so threads are safe.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from equifeat.draw import Pixels, sheet, to_bytes
from equifeat.draw_matches import match_picture as match_picture
from equifeat.errors import CorrespondenceError
from equifeat.eval.equivariance import PosedView, SampledMap
from equifeat.eval.matching import nearest
from equifeat.files import atomic_file
from equifeat.geometry.camera import invert, relative, transform
from equifeat.geometry.covisibility import correspond
from equifeat.geometry.pixels import SizeHW, crop, pixel_centers, pixel_index, resize, scale_xy
from equifeat.metrics import box_normalizer, matching_errors, pck
from equifeat.pca_colors import fit_basis

_GROUND = 238  # Background of an object in a coloured cell.
_MARGIN = 1.12  # Side of the drawn window over the object's.
_COMMON = 0.05  # Below this share of visible pixels a number would be noise.


@runtime_checkable
class SceneView(PosedView, Protocol):
    """A posed view that also knows where it is."""

    @property
    def cam_from_world(self) -> Tensor:
        """(4, 4) pose."""
        ...


class Curve(NamedTuple):
    """One line of a panel.

    Attributes:
        x: Positions, for example optimiser steps.
        y: Values.
        low: Lower end of an interval around y, or None.
        high: Upper end.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Panel(NamedTuple):
    """One set of axes.

    Attributes:
        title: Above the axes.
        x_label: Name and unit of x.
        y_label: Name and unit of y.
        curves: Lines by their name in the legend.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]


class _Window(NamedTuple):
    """The part of an image that is drawn.

    Attributes:
        left: First column.
        top: First row.
        size_hw: Height and width.
    """

    left: int
    top: int
    size_hw: SizeHW


class _Grid(NamedTuple):
    """The object pixels of a view, on a coarse grid of pixel centres.

    Attributes:
        shape: Rows and columns of the grid.
        on: (cells,) which cells show the object.
        xy: (N, 2) pixels of the view where they do.
        depth: (N,) z-depth there.
        points: (N, 3) object coordinates.
    """

    shape: SizeHW
    on: Tensor
    xy: Tensor
    depth: Tensor
    points: Tensor


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a picture as PNG, whole or not at all.

    Args:
        picture: The picture.
        path: File to write, its name ends in .png.
    """
    with atomic_file(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def pca_rgb(
    features: Float[Tensor, "b d h w"], mask: Bool[Tensor, "b h w"] | None = None
) -> Float[Tensor, "b h w 3"]:
    """Show features by their three largest principal components, one basis for the whole batch.

    Args:
        features: Feature maps.
        mask: Where to look; the rest is 0. None for everywhere.

    Returns:
        RGB in [0, 1]: components 1 to 3, each stretched from its 2nd to its 98th percentile. The
        sign of a component is chosen so that its skewness is positive.
    """
    b, d, h, w = features.shape
    rows = features.detach().float().cpu().permute(0, 2, 3, 1).reshape(-1, d)
    on = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask.cpu().reshape(-1)
    out = torch.zeros(len(rows), 3)
    out[on] = _pca_colors(rows[on])
    return out.reshape(b, h, w, 3)


def _pca_colors(rows: Tensor) -> Tensor:
    """(N, D) to (N, 3) in [0, 1]; a view may show no object at all."""
    return fit_basis(rows).colors(rows) if len(rows) else torch.zeros(0, 3)


def transfer_picture(
    views: Sequence[SceneView],
    features: Mapping[str, Sequence[SampledMap]],
    *,
    cell: int = 224,
    detail: int = 112,
    title: str = "Correspondence transfer",
) -> Image.Image:
    """Carry colours from view 0 to the other views by nearest features, one row a model.

    View 0 is coloured by object coordinates (x red, y green, z blue). Each pixel of another view
    takes the colour of the pixel of view 0 with the nearest descriptor; a perfect model gives the
    row "truth". Surface that view 0 does not see cannot be right and is drawn pale.

    Args:
        views: At least two views of one object.
        features: By the model's name: one feature map a view, each of a batch of one.
        cell: Longer side of a cell in pixels.
        detail: Matched points along the longer side of a cell; time grows with its fourth power.
        title: Heading.

    Returns:
        A grid: images, truth, then one row a model with the share of correct pixels per cell.
    """
    windows = _windows(views)
    grids = [_grid(view, w, detail) for view, w in zip(views, windows, strict=True)]
    every = torch.cat([g.points for g in grids])
    low, high = every.amin(0), every.amax(0)
    colors = [((g.points - low) / (high - low).clamp_min(1e-9)).float() for g in grids]
    seen, truth_xy = [torch.ones(len(grids[0].xy), dtype=torch.bool)], [grids[0].xy]
    for view, grid in zip(views[1:], grids[1:], strict=True):
        # Looser than training's test: the picture should not be speckled along creases.
        found = correspond(
            grid.xy, grid.depth, views[0].depth, view.camera, views[0].camera,
            relative(view.cam_from_world, views[0].cam_from_world),
            depth_tol=0.01, max_error_px=2.0,
        )  # fmt: skip
        seen.append(found.covisible)
        truth_xy.append(found.xy)
    rows = [
        [_photo(view, w, cell) for view, w in zip(views, windows, strict=True)],
        [_paint(*args, cell) for args in zip(grids, colors, seen, strict=True)],
    ]
    notes: list[list[str]] = [[""] * len(views)] * 2
    box = box_normalizer(views[0].mask)
    for maps in features.values():
        source = _descriptors(maps[0], grids[0])
        row, note = [rows[1][0]], ["source"]
        for k in range(1, len(views)):
            index = nearest(_descriptors(maps[k], grids[k]), source).matches0.cpu()
            row.append(_paint(grids[k], colors[0][index], seen[k], cell))
            right = matching_errors(grids[0].xy[index], truth_xy[k], box)[seen[k]]
            enough = len(right) > _COMMON * len(seen[k])
            note.append(f"{pck(right, 0.1):.0f} % right" if enough else "too little in common")
        rows.append(row)
        notes.append(note)
    return sheet(
        title,
        ["view 0", *(f"view {k}" for k in range(1, len(views)))],
        ["image", "truth", *features],
        rows,
        notes,
        "Colour is the place on the object (x red, y green, z blue), carried from view 0 by the "
        "nearest feature. Compare each row with the truth. Pale: not visible in view 0. Right: "
        "within 10 % of the longer side of the object's box in view 0, among what is visible.",
    )


def pca_picture(
    views: Sequence[PosedView],
    features: Mapping[str, Sequence[SampledMap]],
    *,
    cell: int = 224,
    detail: int = 112,
    title: str = "Principal components of the features",
) -> Image.Image:
    """Show the first three principal components on the object, one row a model.

    Args:
        views: Views of one object.
        features: By the model's name: one feature map a view, each of a batch of one.
        cell: Longer side of a cell in pixels.
        detail: Points along the longer side of a cell.
        title: Heading.

    Returns:
        A grid: images, then one row a model. The basis is shared by the views of a model.
    """
    windows = _windows(views)
    shapes = [_coarse(view, w, detail) for view, w in zip(views, windows, strict=True)]
    rows = [[_photo(view, w, cell) for view, w in zip(views, windows, strict=True)]]
    for maps in features.values():
        found = [
            m.sample(xy[None].to(_device(m)))[0].float().cpu()
            for m, (_, _, xy) in zip(maps, shapes, strict=True)
        ]
        colors = torch.split(_pca_colors(torch.cat(found)), [len(f) for f in found])
        rows.append(
            [_fill(shape, on, c, cell) for (shape, on, _), c in zip(shapes, colors, strict=True)]
        )
    return sheet(
        title,
        [f"view {k}" for k in range(len(views))],
        ["image", *features],
        rows,
        [[""] * len(views)] * len(rows),
        "Components 1, 2, 3 as red, green, blue; one basis for all views of a model. The same "
        "part of the object should keep its colour from view to view.",
    )


def curves_picture(panels: Sequence[Panel], *, width: int = 1000, height: int = 340) -> Image.Image:
    """Draw curves side by side.

    Args:
        panels: One set of axes each.
        width: Width of the picture in pixels.
        height: Height in pixels.

    Returns:
        The picture.
    """
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for k, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), k + 1)
        for name, curve in panel.curves.items():
            marker = "o" if len(curve.x) < 20 else None
            (line,) = axes.plot(curve.x, curve.y, label=name, marker=marker, markersize=4)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, lw=0
                )
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.curves:
            axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _device(feature_map: SampledMap) -> torch.device:
    held = getattr(feature_map, "features", None)
    return held.device if isinstance(held, Tensor) else torch.device("cpu")


def _fit(size_hw: SizeHW, side: int) -> SizeHW:
    scale = side / max(size_hw)
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def _windows(views: Sequence[PosedView]) -> list[_Window]:
    """A square of one size around the object in every view; whole images when it is not small."""
    boxes = []
    for view in views:
        row, column = (view.mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
        if not len(row):
            raise CorrespondenceError("a view to draw shows nothing of the object; leave it out.")
        boxes.append((int(column[0]), int(row[0]), int(column[-1]) + 1, int(row[-1]) + 1))
    side = round(_MARGIN * max(max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes))
    out = []
    for view, (x0, y0, x1, y1) in zip(views, boxes, strict=True):
        h, w = int(view.mask.shape[0]), int(view.mask.shape[1])
        if side > min(h, w):
            out.append(_Window(0, 0, (h, w)))
            continue
        left = min(max((x0 + x1 - side) // 2, 0), w - side)
        top = min(max((y0 + y1 - side) // 2, 0), h - side)
        out.append(_Window(left, top, (side, side)))
    return out


def _coarse(view: PosedView, window: _Window, detail: int) -> tuple[SizeHW, Tensor, Tensor]:
    """Grid shape, which cells show the object, and the view's pixel centres there."""
    shape = _fit(window.size_hw, min(detail, max(window.size_hw)))
    xy = scale_xy(pixel_centers(shape).reshape(-1, 2), shape, window.size_hw)
    column, row = pixel_index(xy + xy.new_tensor([window.left, window.top])).unbind(-1)
    on = view.mask[row, column]
    return shape, on, torch.stack([column[on], row[on]], dim=-1) + 0.5


def _grid(view: SceneView, window: _Window, detail: int) -> _Grid:
    shape, on, xy = _coarse(view, window, detail)
    column, row = pixel_index(xy).unbind(-1)
    depth = view.depth[row, column]
    xy = xy.to(depth.dtype)
    points = transform(invert(view.cam_from_world), view.camera.unproject(xy, depth))
    return _Grid(shape, on, xy, depth, points)


def _descriptors(feature_map: SampledMap, grid: _Grid) -> Tensor:
    xy = grid.xy.float()[None].to(_device(feature_map))
    return F.normalize(feature_map.sample(xy)[0], dim=-1)


def _photo(view: PosedView, window: _Window, side: int) -> Pixels:
    part = crop(view.image.float()[None], (window.left, window.top), window.size_hw)
    return to_bytes(resize(part, _fit(window.size_hw, side))[0].permute(1, 2, 0))


def _paint(grid: _Grid, colors: Tensor, seen: Tensor, side: int) -> Pixels:
    pale = 0.82 + 0.12 * colors
    return _fill(grid.shape, grid.on, torch.where(seen[:, None], colors, pale), side)


def _fill(shape: SizeHW, on: Tensor, colors: Tensor, side: int) -> Pixels:
    cells = torch.full((len(on), 3), _GROUND / 255.0)
    cells[on] = colors
    image = cells.reshape(*shape, 3).permute(2, 0, 1)[None]
    return to_bytes(resize(image, _fit(shape, side), mode="nearest")[0].permute(1, 2, 0))
