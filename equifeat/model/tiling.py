"""Features of huge images: overlapping windows of whole patches, blended on one grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.geometry.pixels import resize
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import FeatureMap
from equifeat.model.inputs import Images, gather, size_of, unit_floats


class TileSpan(NamedTuple):
    """Where one tile lies along one axis of the grid, and how much it counts there.

    Attributes:
        start: First cell.
        weights: (cells,) shares; those of all tiles over one cell add up to 1.
    """

    start: int
    weights: Tensor


def tile_spans(cells: int, tile: int, overlap: int) -> list[TileSpan]:
    """Spread tiles evenly over one axis, so that neighbours share at least some cells.

    Where two tiles overlap, their shares fall linearly to 0 at each one's border. The border's
    own cells see the least around them, and a head's convolution sees zeros beyond them.

    Args:
        cells: Cells of the axis.
        tile: Cells of a tile.
        overlap: Least number of cells that neighbours share, below tile.

    Returns:
        The tiles in order; one alone when it holds the axis.
    """
    if tile >= cells:
        return [TileSpan(0, torch.ones(cells))]
    count = math.ceil((cells - overlap) / (tile - overlap))
    starts = [round(k * (cells - tile) / (count - 1)) for k in range(count)]
    shares = []
    for k, start in enumerate(starts):
        before = starts[k - 1] + tile - start if k else 0
        after = start + tile - starts[k + 1] if k + 1 < count else 0
        shares.append(_ramp(tile, before) * _ramp(tile, after).flip(0))
    total = torch.zeros(cells, dtype=torch.float64)
    for start, share in zip(starts, shares, strict=True):
        total[start : start + tile] += share
    return [
        TileSpan(start, (share / total[start : start + tile]).float())
        for start, share in zip(starts, shares, strict=True)
    ]


def _ramp(tile: int, overlap: int) -> Tensor:
    """Return shares that rise from 0 at the border to 1 where the neighbour ends."""
    ramp = torch.ones(tile, dtype=torch.float64)
    if overlap > 0:
        ramp[:overlap] = torch.linspace(0, 1, overlap) if overlap > 1 else 0.5
    return ramp


@torch.no_grad()
def dense_tiled(
    extractor: FeatureExtractor,
    images: Images,
    resolution: int | None = None,
    *,
    tile: int = 64,
    tile_overlap: int | None = None,
    batch_size: int = 4,
    out_device: torch.device | str | None = None,
    overlap: int = 1,
    layers: Sequence[int] = (-1,),
    norm: bool = True,
) -> FeatureMap:
    """Return the map of huge images, made of overlapping windows, without gradients.

    Args:
        extractor: The model.
        images: As for dense(). Bytes and windows are moved to the model's device one by one.
        resolution: Patches on the longer side of the whole image.
        tile: Side of a window in patches.
        tile_overlap: Patches that windows share; a quarter of tile when None.
        batch_size: Windows that run at a time.
        out_device: Where the map is put together; the model's device when None.
        overlap: Patches start every patch_size / overlap pixels.
        layers: Blocks whose tokens are taken.
        norm: Apply the ViT's final norm.

    Returns:
        The features of the patches of the whole image, in float32, on the grid of dense().

    Raises:
        ImageError: As for dense().
        RecipeError: tile, tile_overlap or batch_size is out of range, or as for dense().
    """
    tile_overlap = tile // 4 if tile_overlap is None else tile_overlap
    if tile < 1 or not 0 <= tile_overlap < tile or batch_size < 1:
        raise RecipeError(
            f"tile={tile}, tile_overlap={tile_overlap}, batch_size={batch_size}: tile and "
            "batch_size must be at least 1, and tile_overlap from 0 to tile - 1"
        )
    device, p = extractor.backbone.device, extractor.patch_size
    out_device = device if out_device is None else torch.device(out_device)
    batch = gather(images)
    size_hw = size_of(batch)
    patches_hw = extractor.grid_hw(size_hw, resolution)
    if max(patches_hw) <= tile:
        floats = unit_floats(batch, device)
        found = extractor.dense(floats, resolution, overlap=overlap, layers=layers, norm=norm)
        return replace(found, features=found.features.to(out_device))
    stride = extractor.backbone.stride(overlap)
    whole = (patches_hw[0] * p, patches_hw[1] * p)
    if size_hw != whole:  # else windows are cut from the bytes themselves
        batch = resize(unit_floats(batch, batch.device), whole)
    grid_hw = ((whole[0] - p) // stride + 1, (whole[1] - p) // stride + 1)
    rows, columns = (
        tile_spans(cells, (tile - 1) * overlap + 1, tile_overlap * overlap) for cells in grid_hw
    )
    places = [(k, row, column) for row, column in product(rows, columns) for k in range(len(batch))]
    width = extractor.dim * len(layers)
    out = torch.zeros(len(batch), width, *grid_hw, device=out_device)
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        windows = [_window(batch[k], row, column, p, stride) for k, row, column in chosen]
        windows = [unit_floats(window.to(device), device) for window in windows]
        state = extractor.trunk(torch.stack(windows), overlap=overlap, layers=layers)
        found = extractor.tail(state, layers=layers, norm=norm)
        maps = found.features.float().to(out_device)
        for (k, row, column), features in zip(chosen, maps, strict=True):
            weights = (row.weights[:, None] * column.weights).to(out_device)
            h, w = weights.shape
            y, x = row.start, column.start
            out[k, :, y : y + h, x : x + w] += features * weights
    if len(layers) > 1:  # the mean of two unit vectors is shorter
        for part in torch.split(out, extractor.dim, dim=1):
            part.copy_(F.normalize(part, dim=1))
    margin_y, margin_x = ((p - stride) / 2 * size_hw[axis] / whole[axis] for axis in (0, 1))
    return replace(found, features=out, size_hw=size_hw, margin_yx=(margin_y, margin_x))


def _window(image: Tensor, row: TileSpan, column: TileSpan, patch: int, stride: int) -> Tensor:
    """Cut out the pixels under the cells of a tile."""
    y, x = row.start * stride, column.start * stride
    h, w = ((len(span.weights) - 1) * stride + patch for span in (row, column))
    return image[:, y : y + h, x : x + w]
