from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.image_files import read_image
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.head import HeadKind
from equifeat.model.tiling import tile_spans
from tests.eval.allocations import Allocations
from tests.model.tiny import backbone, images, randomize


def tiny(kind: str = "dinov2", head: HeadKind = "conv") -> FeatureExtractor:
    extractor = build_extractor(backbone(kind), head=head, lora_blocks=2, lora_rank=2).eval()
    assert extractor.adapter is not None
    randomize(extractor.adapter)
    return extractor


def photograph() -> Tensor:
    """The photograph that matplotlib brings, 600 × 512."""
    return read_image(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")[None]


@cache
def real() -> FeatureExtractor:
    extractor = build_extractor(
        "vit_small_patch14_dinov2.lvd142m", "packaged", head="residual", lora_blocks=0
    ).eval()
    assert extractor.head.conv is not None
    generator = torch.Generator().manual_seed(0)
    weight = extractor.head.conv.weight
    with torch.no_grad():
        weight.copy_(0.005 * torch.randn(weight.shape, generator=generator))
    return extractor


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 400), st.integers(1, 90), st.data())
def test_tiles_cover_the_axis_and_their_shares_add_up(
    cells: int, tile: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    spans = tile_spans(cells, tile, overlap)
    total = torch.zeros(cells)
    for span in spans:
        assert span.start >= 0
        assert len(span.weights) == min(tile, cells)
        assert float(span.weights.min()) >= 0
        total[span.start : span.start + tile] += span.weights
    assert torch.allclose(total, torch.ones(cells), atol=1e-5)
    pairs = list(pairwise(spans))
    assert all(a.start + tile - b.start >= overlap for a, b in pairs)
    assert all(a.start < b.start for a, b in pairs)
    # No more tiles than needed: one fewer would leave less overlap than asked.
    assert len(pairs) == 0 or len(pairs) * tile - (len(pairs) - 1) * overlap < cells


def test_shares_fall_linearly_to_the_border() -> None:
    first, second = tile_spans(13, 9, 5)
    assert (first.start, second.start) == (0, 4)
    assert first.weights.tolist() == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert second.weights.tolist() == first.weights.tolist()[::-1]
    hard = tile_spans(8, 4, 0)
    assert [span.weights.tolist() for span in hard] == [[1] * 4] * 2
    assert tile_spans(7, 4, 1)[0].weights[-1] == 0.5


OPTIONS: list[dict[str, Any]] = [
    {},
    {"overlap": 2},
    {"layers": (0, -1)},
    {"layers": (-2,), "norm": False, "overlap": 2},
    {"resolution": 6},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_tile_is_dense_to_the_bit(options: dict[str, Any]) -> None:
    model, batch = tiny(), images(2, 90, 71)
    expected = model.dense(batch, **options)
    found = model.dense_tiled(batch, tile=7, tile_overlap=3, **options)
    assert torch.equal(found.features, expected.features)
    assert (found.size_hw, found.margin_yx) == (expected.size_hw, expected.margin_yx)
    assert not found.features.requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size_hw", [(84, 98), (80, 103)])
def test_a_tiled_map_has_the_untiled_grid_and_is_made_of_windows(
    options: dict[str, Any], size_hw: tuple[int, int]
) -> None:
    """Against windows cut by hand from the resized image and averaged by their shares."""
    model, batch = tiny(), images(2, *size_hw)
    whole = model.dense(batch, **options)
    found = model.dense_tiled(batch, tile=4, tile_overlap=2, batch_size=3, **options)
    assert found.features.shape == whole.features.shape
    assert found.margin_yx == pytest.approx(whole.margin_yx)
    assert torch.allclose(found.centers(), whole.centers(), atol=1e-4)
    assert not torch.allclose(found.features, whole.features, atol=1e-2)

    options = dict(options)
    rows, columns = model.grid_hw(size_hw, options.pop("resolution", None))
    k, p = options.get("overlap", 1), model.patch_size
    resized = F.interpolate(batch, (rows * p, columns * p), mode="bilinear", antialias=True)
    total, expected = torch.zeros(1, 1, *found.grid_hw), torch.zeros_like(found.features)
    side = 3 * k + 1
    for row in tile_spans(found.grid_hw[0], side, 2 * k):
        for column in tile_spans(found.grid_hw[1], side, 2 * k):
            y, x = row.start * p // k, column.start * p // k
            window = resized[..., y : y + 4 * p, x : x + 4 * p]
            weights = row.weights[:, None] * column.weights
            place = (
                ...,
                slice(row.start, row.start + side),
                slice(column.start, column.start + side),
            )
            expected[place] += model.dense(window, **options).features.detach() * weights
            total[place] += weights
    expected = expected / total
    if len(options.get("layers", (0,))) > 1:
        first, second = expected.chunk(2, dim=1)
        expected = torch.cat([F.normalize(first, dim=1), F.normalize(second, dim=1)], dim=1)
        norms = torch.stack(found.features.chunk(2, dim=1)).norm(dim=2)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    assert torch.allclose(found.features, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "dinov3", "rope_mixed", "eva_split"])
def test_every_family_is_tiled(kind: str) -> None:
    """Where features depend on their own patch alone, tiling changes nothing."""
    model = build_extractor(backbone(kind), head="none", lora_blocks=0).eval()
    p = model.patch_size
    flat = torch.full((1, 3, 6 * p, 8 * p), 0.3)
    found = model.dense_tiled(flat, tile=4, tile_overlap=2)
    window = model.dense(flat[..., : 4 * p, : 4 * p]).features
    assert found.grid_hw == (6, 8)
    assert torch.allclose(found.features[..., :2, :2], window[..., :2, :2], atol=1e-4)
    assert torch.allclose(found.features[..., -1, -1], window[..., -1, -1], atol=1e-4)


def test_batches_bytes_and_files_give_the_same(tmp_path: Path) -> None:
    model = tiny()
    pixels = (images(1, 84, 112) * 255).to(torch.uint8)  # whole patches: cut from the bytes
    expected = model.dense_tiled(pixels.float() / 255, tile=4, tile_overlap=1).features
    for size in (1, 5):
        found = model.dense_tiled(pixels, tile=4, tile_overlap=1, batch_size=size).features
        assert torch.allclose(found, expected, atol=1e-5)
    wide = model.dense_tiled(pixels, tile=6, tile_overlap=2, out_device="cpu")
    assert wide.grid_hw == (6, 8)  # one axis in one tile, the other in two
    assert torch.equal(model.dense_tiled(pixels, tile=6, tile_overlap=2).features, wide.features)


def test_memory_grows_with_the_tile_and_not_with_the_image() -> None:
    """Beside what goes in and comes out. What a whole image takes grows with its patches."""
    model = tiny(head="none")
    peaks = []
    for tile, columns in ((64, 48), (8, 48), (8, 24)):
        batch = torch.rand(1, 3, 24 * 14, columns * 14)
        with torch.no_grad(), Allocations() as seen:
            out = model.dense_tiled(batch, tile=tile, tile_overlap=2, batch_size=1)
        peaks.append(seen.peak_bytes - out.features.numel() * out.features.element_size())
    whole, tiled, half = peaks
    assert tiled < 0.15 * whole
    assert tiled < 1.2 * half


@pytest.mark.parametrize(
    "options",
    [{"tile": 0}, {"tile_overlap": -1}, {"tile": 8, "tile_overlap": 8}, {"batch_size": 0}],
)
def test_impossible_tiles_are_named(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=f"{min(options)}={options[min(options)]}.*must be"):
        tiny().dense_tiled(images(), **options)
    with pytest.raises(RecipeError, match="overlap=3 would start patches"):
        tiny().dense_tiled(images(1, 84, 84), tile=3, tile_overlap=1, overlap=3)


def test_blending_leaves_no_seams_in_dinov2() -> None:
    """How the error changes from row to row where tiles end, against everywhere else."""
    image, model = photograph(), real()
    with torch.no_grad():
        whole = model.dense(image, 22).normalized().features
    ratios = {}
    for tile_overlap in (0, 6):
        tiled = model.dense_tiled(image, 22, tile=11 + tile_overlap // 2, tile_overlap=tile_overlap)
        error = tiled.normalized().features - whole
        steps = (error[:, :, 1:] - error[:, :, :-1]).norm(dim=1).mean(dim=(0, 2))
        spans = tile_spans(22, 11 + tile_overlap // 2, tile_overlap)
        inner = {span.start - 1 for span in spans[1:]}
        inner |= {span.start + len(span.weights) - 1 for span in spans[:-1]}
        seams = torch.tensor([index in inner for index in range(len(steps))])
        assert 1 <= int(seams.sum()) <= 4
        ratios[tile_overlap] = float(steps[seams].mean() / steps[~seams].mean())
        assert float((tiled.normalized().features * whole).sum(1).mean()) > 0.7
    assert ratios[0] > 1.8
    assert ratios[6] < 1.2
