"""Pictures: right colours in the right places, readable without a display."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equifeat.errors import CorrespondenceError
from equifeat.viz import (
    Curve,
    Panel,
    curves_picture,
    match_picture,
    pca_picture,
    pca_rgb,
    save_png,
    transfer_picture,
)
from tests.eval.spheres import Oracle, RandomFeatures, Sphere

SPHERE = Sphere("a", (0, 20, 40), size=96)
VIEWS = [SPHERE.view(i) for i in range(3)]
ORACLE, RANDOM = Oracle(SPHERE), RandomFeatures()
MAPS = {
    "oracle": [ORACLE.dense(v.image[None]) for v in VIEWS],
    "random features": [RANDOM.dense(v.image[None]) for v in VIEWS],
}


def rows_of(
    page: Image.Image, count: int, side: int
) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """The last column of every row of cells."""
    pixels = np.asarray(page)
    left = page.width - side - 6
    top, found = 52, []
    for row in range(count):
        found.append(pixels[top : top + side, left : left + side])
        top += side + 6 + (20 if row >= 2 else 0)
    return found


def test_transfer_by_the_oracle_repeats_the_truth_and_random_does_not() -> None:
    page = transfer_picture(VIEWS, MAPS, cell=96, detail=48)
    _, truth, oracle, random = rows_of(page, 4, 96)
    bright = truth.max(-1).astype(int) - truth.min(-1) > 60  # not pale, not ground
    assert bright.sum() > 500
    error = np.abs(truth.astype(int) - oracle).mean(-1)
    assert float(np.mean(error[bright] < 24)) > 0.97
    assert float(np.abs(truth.astype(int) - random).mean(-1)[bright].mean()) > 40


def test_views_without_the_object_are_refused() -> None:
    empty = VIEWS[0]._replace(mask=torch.zeros_like(VIEWS[0].mask))
    with pytest.raises(CorrespondenceError, match="nothing of the object"):
        transfer_picture([VIEWS[0], empty], {})


def test_an_object_that_fills_the_image_is_drawn_whole() -> None:
    h, w = VIEWS[0].mask.shape
    full = VIEWS[0]._replace(mask=torch.ones(h, w, dtype=torch.bool))
    page = pca_picture([full], {"random": MAPS["random features"][:1]}, cell=96, detail=48)
    assert page.height > 2 * 96


def test_opposite_views_have_nothing_in_common() -> None:
    sphere = Sphere("b", (0, 180), size=48)
    views = [sphere.view(0), sphere.view(1)]
    oracle = Oracle(sphere)
    maps = {"oracle": [oracle.dense(v.image[None]) for v in views]}
    assert transfer_picture(views, maps, cell=48, detail=24).width > 96


def test_pca_picture_has_a_row_a_model() -> None:
    one = pca_picture(VIEWS, {"oracle": MAPS["oracle"]}, cell=64, detail=32)
    two = pca_picture(VIEWS, MAPS, cell=64, detail=32)
    assert 32 < two.height - one.height <= 64 + 6  # The footer may need fewer lines.


def test_pca_rgb_shares_its_basis_and_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(1, 8, 6, 5, generator=generator)
    features = torch.cat([half, half])
    rgb = pca_rgb(features)
    assert rgb.shape == (2, 6, 5, 3)
    assert torch.equal(rgb[0], rgb[1])
    assert float(rgb.min()) >= 0.0
    assert float(rgb.max()) <= 1.0
    assert float(rgb.std(dim=(0, 1, 2)).min()) > 0.1
    mask = torch.zeros(2, 6, 5, dtype=torch.bool)
    mask[:, 2:4] = True
    shown = pca_rgb(features, mask)
    assert not shown[~mask].any()
    assert shown[mask].any()
    assert not pca_rgb(features, torch.zeros_like(mask)).any()
    assert pca_rgb(torch.ones(1, 2, 3, 3)).shape == (1, 3, 3, 3)


def test_match_lines_are_coloured_by_error() -> None:
    black = torch.zeros(3, 100, 100)
    xy0 = torch.tensor([[10.0, 20.0], [10.0, 80.0]])
    xy1 = torch.tensor([[90.0, 20.0], [90.0, 80.0]])
    page = match_picture(black, black, xy0, xy1, torch.tensor([0.0, 0.5]), height=200)
    pixels = np.asarray(page).astype(int)
    good, bad = pixels[52 + 40, 100], pixels[52 + 160, 100]
    assert good[1] > good[0]
    assert bad[0] > bad[1]
    assert not pixels[52 + 100, 100].any()


def test_match_picture_takes_other_sizes_no_values_and_no_matches() -> None:
    wide, tall = torch.rand(3, 50, 80), torch.rand(3, 90, 40)
    one = torch.tensor([[40.0, 25.0]])
    page = match_picture(wide, tall, one, one, height=120, titles=("A.png", "B.png"))
    assert page.width == 192 + 53 + 18
    none = match_picture(wide, tall, torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))
    assert none.height > 420


def test_curves_and_saving(tmp_path: Path) -> None:
    panels = [
        Panel("Loss", "step", "SmoothAP", {"train": Curve([0, 1, 2], [0.5, 0.4, 0.3])}),
        Panel("PCDP@.10", "step", "%", {"m": Curve([0, 2], [10, 20], [8, 15], [12, 25])}),
        Panel("empty", "step", "%", {}),
    ]
    page = curves_picture(panels, width=900, height=300)
    assert page.size == (900, 300)
    save_png(page, tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as again:
        assert again.size == (900, 300)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["curves.png"]


def test_pictures_can_be_made_in_other_threads() -> None:
    done: list[Image.Image] = []

    def draw() -> None:
        done.append(curves_picture([Panel("t", "x", "y", {"c": Curve([0, 1], [1, 0])})]))

    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3
