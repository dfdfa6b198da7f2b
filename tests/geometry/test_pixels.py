from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equifeat.geometry import pixels


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.integers(1, 4))
def test_resize_then_sample_is_sample_then_resize_for_linear_images(
    h: int, w: int, kx: int, ky: int
) -> None:
    """A linear ramp survives any resize: only a half-pixel mistake would move it."""
    big = (h * ky, w * kx)
    ramp = pixels.pixel_centers(big, dtype=torch.float64).permute(2, 0, 1)[None]
    small = pixels.resize(ramp, (h, w))
    inner = torch.tensor([[[w / 2, h / 2]]], dtype=torch.float64)
    value = pixels.sample(small, inner, (h, w))[0, 0]
    expected = pixels.scale_xy(inner, (h, w), big)[0, 0]
    assert torch.allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_patch_centers_sample_their_own_patch(grid: tuple[int, int]) -> None:
    size = (grid[0] * 14, grid[1] * 14)
    features = torch.rand(1, 8, *grid)
    xy = pixels.patch_centers(grid, size)
    assert torch.equal(xy[0, 0], torch.tensor([7.0, 7.0]))
    out = pixels.sample(features, xy.reshape(1, -1, 2), size)[0]
    assert torch.allclose(out, features[0].reshape(8, -1).T, atol=1e-6)


@pytest.mark.parametrize("patch", [14, 16])
def test_sampling_in_image_pixels_equals_sampling_in_patches_for_any_patch_size(
    patch: int,
) -> None:
    """The reference divides by 14 whatever the patch; ours has no patch size to get wrong."""
    features = torch.rand(1, 3, 5, 7)
    size = (5 * patch, 7 * patch)
    xy = torch.rand(1, 20, 2) * torch.tensor([size[1], size[0]])
    a = pixels.sample(features, xy, size)
    b = pixels.sample(features, xy / patch, (5, 7))
    assert torch.allclose(a, b, atol=1e-5)


def test_normalize_round_trip_and_inside() -> None:
    xy = torch.rand(5, 2) * 30
    assert torch.allclose(
        pixels.denormalize_xy(pixels.normalize_xy(xy, (9, 31)), (9, 31)), xy, atol=1e-5
    )
    at = torch.tensor([[0.0, 0.0], [31.0, 0.0], [30.99, 8.99], [-0.01, 3.0], [3.0, 9.0]])
    assert pixels.inside(at, (9, 31)).tolist() == [True, False, True, False, False]


def test_nearest_resize_takes_the_pixel_under_the_centre() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert pixels.resize(image, (2, 2), "nearest").flatten().tolist() == [5.0, 7.0, 13.0, 15.0]


def test_crop_moves_points_by_its_corner() -> None:
    image = pixels.pixel_centers((10, 12)).permute(2, 0, 1)[None]
    window = pixels.crop(image, (3, 2), (4, 5))
    assert torch.equal(window[0, :, 0, 0], torch.tensor([3.5, 2.5]))
    with pytest.raises(ValueError, match="leaves the image"):
        pixels.crop(image, (9, 2), (4, 5))


def test_sample_has_gradients() -> None:
    features = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    xy = torch.tensor([[[1.2, 0.9], [2.6, 1.7]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, p: pixels.sample(f, p, (3, 3)), (features, xy))
