from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from equifeat.data.augment import (
    Augment,
    apply_affine,
    augment_view,
    draw_background,
    warp,
)
from equifeat.data.lighting import normals, relight
from equifeat.errors import ImageError, RecipeError
from equifeat.geometry.camera import Camera
from equifeat.geometry.pixels import pixel_centers
from equifeat.seeding import numpy_generator

SIZE = (120, 160)
NOTHING = Augment(affine_p=0.0, blur_p=0.0, noise_p=0.0, clahe_p=0.0, color_p=0.0)


def blobs(keypoints: Tensor, size_hw: tuple[int, int], sigma: float = 2.0) -> Tensor:
    """(N, H, W): one Gaussian blob around each keypoint, in corner pixels."""
    grid = pixel_centers(size_hw, dtype=torch.float64)
    square = (grid[None] - keypoints.double()[:, None, None]).square().sum(-1)
    return torch.exp(-square / (2 * sigma**2))


def centroid(image: Tensor) -> Tensor:
    grid = pixel_centers((image.shape[-2], image.shape[-1]), dtype=torch.float64)
    total = image.double().sum((-2, -1))
    return (image.double()[..., None] * grid).sum((-3, -2)) / total[..., None]


def scene() -> tuple[Tensor, Tensor, Tensor, Camera]:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((3, *SIZE), dtype=np.float32)) * 0.5 + 0.25
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[30:90, 40:120] = True
    depth = mask * torch.linspace(1.5, 2.0, SIZE[1])
    return image * mask, mask, depth, Camera.from_focal(150.0, SIZE)


def run(augment: Augment | None, background: str = "black", seed: int = 0, **over: Any) -> Any:
    image, mask, depth, camera = scene()
    keypoints = pixel_centers(SIZE)[mask][::37]
    given = {"image": image, "mask": mask, "depth": depth, **over}
    return augment_view(
        given["image"],
        given["mask"],
        given["depth"],
        camera,
        keypoints,
        augment,
        background,
        numpy_generator(seed, 1),
    )


def test_keypoints_follow_the_image_to_a_tenth_of_a_pixel() -> None:
    """Half a pixel of mistake in the border to kornia would fail this by a factor of five."""
    keypoints = torch.tensor([[80.5, 60.5], [60.5, 40.5], [100.5, 80.5], [71.25, 66.75]])
    painted = blobs(keypoints, SIZE)
    augment = Augment(affine_p=1.0)
    moved_far = 0
    for seed in range(20):
        A = augment.draw_affine(SIZE, np.random.default_rng(seed))
        assert A is not None
        moved = apply_affine(A, keypoints)
        found = centroid(warp(painted, A))
        # Only blobs that are whole in the new image have their centre of mass at their centre.
        limit = torch.tensor([SIZE[1], SIZE[0]]) - 12
        whole = ((moved > 12) & (moved < limit)).all(-1)
        assert float((found - moved)[whole].norm(dim=-1).max() if whole.any() else 0) < 0.1
        moved_far += int(((moved - keypoints)[whole].norm(dim=-1) > 5).sum())
    assert moved_far > 20


def test_identity_and_whole_pixel_shift_are_exact() -> None:
    image = scene()[0]
    assert torch.allclose(warp(image, torch.eye(3, dtype=torch.float64)), image, atol=1e-5)
    A = torch.eye(3, dtype=torch.float64)
    A[0, 2], A[1, 2] = 3.0, -2.0
    shifted = warp(image, A)
    assert torch.allclose(shifted[:, :-2, 3:], image[:, 2:, :-3], atol=1e-4)
    assert float(shifted[:, :, :3].abs().max()) == 0.0
    nearest = warp(image, A, "nearest")
    assert torch.equal(nearest[:, :-2, 3:], image[:, 2:, :-3])


def test_the_affine_map_is_drawn_from_the_given_ranges() -> None:
    rng = np.random.default_rng(0)
    augment = Augment()
    maps = [augment.draw_affine(SIZE, rng) for _ in range(400)]
    some = torch.stack([A for A in maps if A is not None])
    # p = 0.5: 200 ± 10, five standard deviations.
    assert abs(len(some) - 200) < 50
    scale = torch.linalg.det(some[:, :2, :2]).sqrt()
    turn = torch.rad2deg(torch.atan2(some[:, 1, 0], some[:, 0, 0]))
    middle = torch.tensor([SIZE[1] / 2, SIZE[0] / 2], dtype=torch.float64)
    shift = (some[:, :2, :2] @ middle + some[:, :2, 2] - middle) / torch.tensor(
        [SIZE[1], SIZE[0]], dtype=torch.float64
    )
    for values, low, high in ((scale, 0.75, 1.25), (turn, -45.0, 45.0), (shift, -0.25, 0.25)):
        assert low <= float(values.min()) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < float(values.max()) <= high


def test_image_mask_depth_and_camera_move_together() -> None:
    out = run(dataclasses.replace(NOTHING, affine_p=1.0), seed=4)
    assert out.changed
    assert torch.equal(out.mask, out.depth > 0)
    assert float(out.image[:, ~out.mask].abs().max()) == 0.0
    assert float(out.image[:, out.mask].min()) >= 0.0
    image, mask, _, camera = scene()
    # The inverse map of the new K and the old gives the affine map: it moves the mask's middle.
    A = out.camera.K.double() @ torch.linalg.inv(camera.K.double())
    assert torch.allclose(A[2], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    inside = apply_affine(A, centroid(mask[None]))
    if bool(out.kept.all()):
        assert float((inside - centroid(out.mask[None])).norm()) < 0.2
    corners = apply_affine(A, pixel_centers(SIZE)[mask][::37])
    assert torch.allclose(corners, out.keypoints, atol=1e-3)
    assert image.shape == out.image.shape


def test_keypoints_that_leave_the_image_are_marked() -> None:
    augment = dataclasses.replace(NOTHING, affine_p=1.0, shift=0.6)
    lost = 0
    for seed in range(10):
        out = run(augment, seed=seed)
        x, y = out.keypoints.unbind(-1)
        inside = (x >= 0) & (x < SIZE[1]) & (y >= 0) & (y < SIZE[0])
        assert torch.equal(out.kept, inside)
        lost += int((~inside).sum())
    assert lost > 10


@pytest.mark.parametrize("name", ["blur_p", "noise_p", "clahe_p", "color_p"])
def test_each_colour_change_changes_the_object_and_leaves_black_black(name: str) -> None:
    before = run(NOTHING)
    assert not before.changed
    assert torch.equal(before.image, scene()[0])
    only: Any = {name: 1.0}
    out = run(dataclasses.replace(NOTHING, **only))
    assert out.changed
    mask = scene()[1]
    assert torch.equal(out.mask, mask)
    assert float(out.image[:, ~mask].abs().max()) == 0.0
    difference = (out.image - before.image)[:, mask].abs()
    assert 1e-3 < float(difference.mean()) < 0.4
    assert 0.0 <= float(out.image.min()) <= float(out.image.max()) <= 1.0
    assert torch.equal(out.image, run(dataclasses.replace(NOTHING, **only)).image)
    other = run(dataclasses.replace(NOTHING, **only), seed=1)
    assert not torch.equal(out.image, other.image)


@pytest.mark.parametrize("background", ["noise", "gradient"])
def test_random_backgrounds_fill_what_is_not_the_object(background: str) -> None:
    out = run(None, background)
    image, mask, _, _ = scene()
    assert out.changed
    assert torch.equal(out.image[:, mask], image[:, mask])
    behind = out.image[:, ~mask]
    assert float(behind.std()) > 0.01
    assert 0.0 <= float(behind.min()) <= float(behind.max()) <= 1.0
    again, other = run(None, background), run(None, background, seed=1)
    assert torch.equal(out.image, again.image)
    assert not torch.equal(out.image, other.image)
    # With colour changes it stays: they come after the background.
    coloured = run(dataclasses.replace(NOTHING, color_p=1.0), background)
    assert float(coloured.image[:, ~mask].std()) > 0.01


def test_a_folder_of_images_as_background(tmp_path: Path) -> None:
    Image.new("RGB", (37, 200), (255, 0, 51)).save(tmp_path / "tall.png")
    (tmp_path / "notes.txt").write_text("not an image")
    out = run(None, str(tmp_path))
    _, mask, _, _ = scene()
    behind = out.image[:, ~mask]
    assert torch.allclose(behind, torch.tensor([1.0, 0.0, 0.2])[:, None].expand_as(behind))
    assert draw_background(str(tmp_path), (50, 31), np.random.default_rng(0)).shape == (3, 50, 31)


def test_a_background_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_text("nothing")
    with pytest.raises(ImageError, match=r"fake\.png"):
        draw_background(str(tmp_path), (50, 31), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_p": 1.5}, r"augment\.blur_p is 1\.5"),
        ({"shift": -0.1}, r"augment\.shift is -0\.1"),
        ({"scale": 1.0}, r"augment\.scale is 1\.0"),
        ({"clahe_clip": 0.0}, r"augment\.clahe_clip is 0\.0"),
        ({"light": 1.0}, r"augment\.light is 1\.0"),
        ({"light_p": -0.5}, r"augment\.light_p is -0\.5"),
        ({"versions": -1}, r"augment\.versions is -1"),
        ({"noise_std": math.nan}, r"augment\.noise_std is nan"),
    ],
)
def test_ranges_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Augment(**options)


def sphere() -> tuple[Tensor, Tensor, Camera, Tensor]:
    """Mask, depth, camera and true normals of a unit sphere three away."""
    camera = Camera.from_focal(150.0, SIZE)
    xy = pixel_centers(SIZE, dtype=torch.float64).reshape(-1, 2)
    rays = camera.unproject(xy.float(), torch.ones(len(xy))).double()
    unit = rays / rays.norm(dim=-1, keepdim=True)
    along = 3.0 * unit[:, 2]
    root = along.square() - 8.0
    distance = along - root.clamp(min=0.0).sqrt()
    points = unit * distance[:, None]
    mask = (root > 0).reshape(SIZE)
    depth = points[:, 2].reshape(SIZE).float() * mask
    center = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    return mask, depth, camera, (points - center).reshape(*SIZE, 3)


def test_normals_are_those_of_the_surface() -> None:
    mask, depth, camera, truth = sphere()
    found = normals(depth, camera)
    assert not bool(found[~mask].any())
    off = torch.rad2deg(torch.acos((found.double() * truth).sum(-1)[mask].clamp(-1.0, 1.0)))
    # Half a pixel of a sphere of 50: 0.6 degrees in the middle, more at the outline.
    assert float(off.median()) < 1.0
    assert float(off.quantile(0.95)) < 5.0
    # Steps of a depth picture hardly show in light that is smoothed.
    coarse = (depth / 2e-3).round() * 2e-3
    image = torch.full((3, *SIZE), 0.5)
    lit = [
        relight(image, mask, values, camera, 0.9, np.random.default_rng(3))
        for values in (depth, coarse)
    ]
    assert float((lit[0] - lit[1]).abs().max()) < 0.05


def test_light_brightens_one_side_and_darkens_the_other() -> None:
    mask, depth, camera, truth = sphere()
    image = torch.full((3, *SIZE), 0.5)
    for seed in range(6):
        lit = relight(image, mask, depth, camera, 0.4, np.random.default_rng(seed))
        assert torch.equal(lit[:, ~mask], image[:, ~mask])
        gain = (lit / image)[0].double()
        assert float((gain[mask] - 1).abs().max()) <= 0.4 + 1e-6
        # Lambert: linear in the normal, up to smoothing.
        slope = torch.linalg.lstsq(truth[mask], (gain - 1)[mask][:, None]).solution
        residual = (truth[mask] @ slope)[:, 0] - (gain - 1)[mask]
        assert float(slope.norm()) <= 0.41
        assert float(residual.abs().mean()) < 0.1 * float(slope.norm())


def test_light_leaves_all_other_random_numbers_alone() -> None:
    mask, depth, camera, _ = sphere()
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0)) * 0.5 * mask

    def augmented(augment: Augment) -> Any:
        rng = numpy_generator(0, 1)
        return augment_view(image, mask, depth, camera, xy, augment, "noise", rng), rng.random()

    xy = pixel_centers(SIZE)[mask][::37]
    (dark, after), (lit, after_lit) = (
        augmented(Augment(affine_p=1.0, light_p=p)) for p in (0.0, 1.0)
    )
    assert after == after_lit
    assert torch.equal(dark.mask, lit.mask)
    assert torch.equal(dark.keypoints, lit.keypoints)
    assert not torch.equal(dark.image[:, dark.mask], lit.image[:, dark.mask])
    only = run(dataclasses.replace(NOTHING, light_p=1.0))
    assert only.changed
    assert float(only.image[:, ~only.mask].abs().max()) == 0.0
    assert sum(
        run(dataclasses.replace(NOTHING, light_p=0.5), seed=s).changed for s in range(40)
    ) in range(8, 33)


def test_full_rotation_in_the_plane_alone() -> None:
    augment = dataclasses.replace(NOTHING, affine_p=1.0, shift=0.0, scale=0.0, rotate_deg=180.0)
    _, _, _, camera = scene()
    turns = []
    for seed in range(40):
        out = run(augment, seed=seed)
        A = out.camera.K.double() @ torch.linalg.inv(camera.K.double())
        middle = torch.tensor([SIZE[1] / 2, SIZE[0] / 2], dtype=torch.float64)
        assert torch.allclose(A[:2, :2] @ middle + A[:2, 2], middle, atol=1e-3)
        assert float(torch.linalg.det(A)) == pytest.approx(1.0, abs=1e-5)
        turns.append(math.degrees(math.atan2(float(A[1, 0]), float(A[0, 0]))))
        column, row = out.keypoints[out.kept].long().unbind(-1)
        assert float(out.mask[row, column].float().mean()) > 0.97  # rounded at the outline
    assert min(turns) < -140
    assert max(turns) > 140
