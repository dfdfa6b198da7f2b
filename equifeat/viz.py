"""Pictures: correspondence transfer, PCA of features, match lines, curves.

Every function returns a PIL image with its own titles and legend, and needs no display: grids are
drawn by NumPy and PIL, curves by matplotlib's Agg canvas without pyplot, so threads are safe.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from equifeat.draw import GAP, QUIET, Pixels, color_bar, font_of, sheet, to_bytes
from equifeat.errors import CorrespondenceError
from equifeat.eval.equivariance import PosedView, SampledMap
from equifeat.eval.matching import nearest
from equifeat.files import atomic_file
from equifeat.geometry.camera import invert, relative, transform
from equifeat.geometry.covisibility import correspond
from equifeat.geometry.pixels import SizeHW, crop, pixel_centers, pixel_index, resize, scale_xy
from equifeat.metrics import box_normalizer, matching_errors, pck

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
    rows = F.normalize(features.detach().float().cpu(), dim=1).permute(0, 2, 3, 1).reshape(-1, d)
    on = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask.cpu().reshape(-1)
    out = torch.zeros(len(rows), 3)
    out[on] = _components(rows[on])
    return out.reshape(b, h, w, 3)


def _components(rows: Tensor) -> Tensor:
    """(N, D) to (N, 3) in [0, 1]."""
    if not len(rows):
        return torch.zeros(0, 3)
    centered = (rows - rows.mean(0)).double()
    _, vectors = torch.linalg.eigh(centered.mT @ centered)
    shown = centered @ vectors[:, -3:].flip(1)
    # The sign of an eigenvector is arbitrary and would flip colours between machines.
    shown *= torch.where(shown.pow(3).sum(0) < 0, -1.0, 1.0)
    shown = F.pad(shown, (0, 3 - shown.shape[1]))
    ends = torch.from_numpy(np.quantile(shown.numpy(), [0.02, 0.98], axis=0))
    return ((shown - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-9)).clamp(0.0, 1.0).float()


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
            F.normalize(m.sample(xy[None].to(_device(m)))[0].float(), dim=-1).cpu()
            for m, (_, _, xy) in zip(maps, shapes, strict=True)
        ]
        colors = torch.split(_components(torch.cat(found)), [len(f) for f in found])
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


def match_picture(
    image0: Float[Tensor, "3 h0 w0"],
    image1: Float[Tensor, "3 h1 w1"],
    xy0: Float[Tensor, "n 2"],
    xy1: Float[Tensor, "n 2"],
    values: Float[Tensor, "n"] | None = None,
    *,
    value_range: tuple[float, float] = (0.0, 0.2),
    label: str = "error / box",
    colormap: str = "RdYlGn_r",
    titles: tuple[str, str] = ("view 0", "view 1"),
    title: str = "Matches",
    height: int = 420,
    max_lines: int = 150,
) -> Image.Image:
    """Draw two images side by side with lines between matched points.

    Args:
        image0: RGB in [0, 1].
        image1: RGB in [0, 1].
        xy0: Pixels of image 0.
        xy1: Their matches, pixels of image 1.
        values: What the lines are coloured by; all alike when None.
        value_range: Values at the two ends of the colour bar.
        label: What the values are.
        colormap: Name of a matplotlib colour map; the default goes from green (low) to red.
        titles: Above the images.
        title: Heading.
        height: Height of both images in the picture, in pixels.
        max_lines: Evenly chosen lines are drawn when there are more.

    Returns:
        The picture, with a colour bar below when there are values.
    """
    photos = [_at_height(image, height) for image in (image0, image1)]
    bottom = 34 if values is None or not len(xy0) else 56
    page = sheet(title, titles, [""], [photos], [["", ""]], "", bottom=bottom)
    top = page.height - height - bottom
    ends = []
    for image, xy, left in (
        (image0, xy0, GAP),
        (image1, xy1, 2 * GAP + photos[0].shape[1]),
    ):
        scale = height / image.shape[-2]
        ends.append(xy.detach().cpu().double().numpy() * scale + np.array([left, 0.0]))
    low, high = value_range
    every = np.zeros(len(xy0)) if values is None else values.detach().cpu().double().numpy()
    scaled = np.clip((every - low) / max(high - low, 1e-12), 0.0, 1.0)
    lut = to_bytes(torch.from_numpy(matplotlib.colormaps[colormap](np.linspace(0, 1, 256))[:, :3]))
    chosen = np.unique(np.linspace(0, max(len(xy0) - 1, 0), min(max_lines, len(xy0))).astype(int))
    colors = lut[(255 * scaled[chosen]).astype(int)]
    box = (0, top, page.width, top + height)
    page.paste(_with_lines(page.crop(box), ends[0][chosen], ends[1][chosen], colors), box)
    draw = ImageDraw.Draw(page)
    text = f"{len(chosen)} of {len(xy0)} matches drawn" if len(xy0) else "no matches"
    draw.text((GAP, page.height - 26), text, fill=QUIET, font=font_of(13))
    if values is not None and len(xy0):
        color_bar(page, lut, value_range, label)
    return page


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


def _at_height(image: Tensor, height: int) -> Pixels:
    h, w = int(image.shape[-2]), int(image.shape[-1])
    size_hw = (height, max(1, round(w * height / h)))
    return to_bytes(resize(image.detach().float().cpu()[None], size_hw)[0].permute(1, 2, 0))


def _with_lines(
    image: Image.Image, a: NDArray[np.float64], b: NDArray[np.float64], colors: Pixels
) -> Image.Image:
    """Lines are drawn three times as large and shrunk: PIL's own are not smooth."""
    large = image.resize((3 * image.width, 3 * image.height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(large)
    for start, end, color in zip(3.0 * a, 3.0 * b, colors.tolist(), strict=True):
        draw.line((*start.tolist(), *end.tolist()), fill=tuple(color), width=4)
        for x, y in (start.tolist(), end.tolist()):
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=tuple(color), outline=(0, 0, 0))
    return large.resize(image.size, Image.Resampling.LANCZOS)


def _paint(grid: _Grid, colors: Tensor, seen: Tensor, side: int) -> Pixels:
    pale = 0.82 + 0.12 * colors
    return _fill(grid.shape, grid.on, torch.where(seen[:, None], colors, pale), side)


def _fill(shape: SizeHW, on: Tensor, colors: Tensor, side: int) -> Pixels:
    cells = torch.full((len(on), 3), _GROUND / 255.0)
    cells[on] = colors
    image = cells.reshape(*shape, 3).permute(2, 0, 1)[None]
    return to_bytes(resize(image, _fit(shape, side), mode="nearest")[0].permute(1, 2, 0))
