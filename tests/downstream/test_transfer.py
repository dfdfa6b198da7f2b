"""Keypoints carried over: between views of one object, and to another one of its family."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.procedural import make_object
from equifeat.data.object_views import View
from equifeat.downstream.transfer import TransferOptions, transfer
from equifeat.errors import CorrespondenceError, ImageError, KeypointError, RecipeError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.model.extractor import build_extractor
from tests.downstream.scenes import dinov2, render, ring, seen_at, stretched, surface_points

STRETCH = (0.85, 1.15, 1.0)
FINE = TransferOptions(temperature=0.02, window=4.0, mutual=2.0)


@cache
def pair(painted: bool, other: bool = False) -> tuple[View, View]:
    mesh = make_object(5)
    poses = ring([0.0, 20.0], 30.0)
    if other:
        return (
            render(mesh, poses[:1], painted)[0],
            render(stretched(mesh, STRETCH), poses[:1], painted)[0],
        )
    view0, view1 = render(mesh, poses, painted)
    return view0, view1


def truth(painted: bool, other: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints of view 0, (N, 2), where they are in view 1, and which are seen there."""
    view0, view1 = pair(painted, other)
    xy, points = surface_points(view0, 120)
    if other:
        points = points * torch.tensor(STRETCH).double()
    there, seen = seen_at(points, view1)
    return xy, there, seen


def errors(model: Any, painted: bool, other: bool, options: TransferOptions) -> Tensor:
    view0, view1 = pair(painted, other)
    xy, there, seen = truth(painted, other)
    assert seen.sum() > 40
    found = transfer(
        model, view0.image, xy[seen], view1.image, options, mask0=view0.mask, mask1=view1.mask
    )
    out: Tensor = (found.keypoints1 - there[seen]).norm(dim=-1)
    return out


def test_oracle_is_exact_to_a_fraction_of_the_stride() -> None:
    fine = errors(CoordinateOracle(), True, False, FINE)
    assert fine.median() < 0.5
    assert fine.quantile(0.9) < 1.5
    coarse = errors(CoordinateOracle(), True, False, TransferOptions(method="nearest", stride=6.0))
    assert coarse.median() > 3 * fine.median()


def test_dinov2_is_about_right_and_random_features_are_not() -> None:
    """On the same object, and on one stretched and recoloured; the object is about 110 px long."""
    for other in (False, True):
        error = errors(dinov2(), False, other, TransferOptions(resolution=24))
        chance = errors(RandomFeatures(), False, other, TransferOptions())
        assert error.median() < 20.0
        assert error.median() < 0.5 * chance.median()


def test_what_is_hidden_is_mostly_not_mutual() -> None:
    view0, view1 = pair(True)
    xy, _, seen = truth(True)
    oracle = CoordinateOracle(width=0.025)
    found = transfer(oracle, view0.image, xy, view1.image, FINE, mask1=view1.mask)
    assert found.mutual[seen].float().mean() > 0.8
    assert found.mutual[~seen].float().mean() < found.mutual[seen].float().mean() - 0.3
    assert found.similarity[seen].mean() > found.similarity[~seen].mean() + 0.1


def test_masks_say_where_places_are_found() -> None:
    view0, view1 = pair(True)
    xy, _, _ = truth(True)
    half = view1.mask.clone()
    half[:, half.any(dim=0).nonzero()[:, 0].median() :] = False
    options = TransferOptions(method="nearest")
    found = transfer(CoordinateOracle(), view0.image, xy, view1.image, options, mask1=half)
    x, y = found.keypoints1.long().unbind(-1)
    assert half[y, x].float().mean() > 0.95
    free = transfer(CoordinateOracle(), view0.image, xy, view1.image, options)
    x, y = free.keypoints1.long().unbind(-1)
    assert half[y, x].float().mean() < 0.8


def test_images_of_other_sizes_and_no_keypoints() -> None:
    view0, view1 = pair(True)
    wide = view1.image.repeat_interleave(2, 2)
    xy, _, seen = truth(True)
    one = transfer(CoordinateOracle(), view0.image, xy[seen], view1.image, FINE)
    two = transfer(CoordinateOracle(), view0.image, xy[seen], wide, FINE)
    doubled = one.keypoints1 * torch.tensor([2.0, 1.0])
    assert (two.keypoints1 - doubled).norm(dim=-1).median() < 1.5
    none = transfer(CoordinateOracle(), view0.image, xy[:0], view1.image)
    assert none.keypoints1.shape == (0, 2)
    assert none.mutual.shape == (0,)


def test_bad_input_is_one_sentence() -> None:
    view0, view1 = pair(True)
    oracle, xy = CoordinateOracle(), torch.tensor([[50.0, 60.0]])
    with pytest.raises(KeypointError, match=r"keypoint 1 at \(224, 3\) lies outside image 0"):
        transfer(oracle, view0.image, torch.tensor([[5.0, 5.0], [224.0, 3.0]]), view1.image)
    with pytest.raises(KeypointError, match=r"\(N, 2\)"):
        transfer(oracle, view0.image, xy[0], view1.image)
    with pytest.raises(ImageError, match="image 1 must be one image, not 2"):
        transfer(oracle, view0.image, xy, torch.stack([view1.image, view1.image]))
    with pytest.raises(ImageError, match="image 1: images must have the shape"):
        transfer(oracle, view0.image, xy, view1.image[:1])
    with pytest.raises(CorrespondenceError, match="mask1"):
        transfer(oracle, view0.image, xy, view1.image, mask1=view1.mask[1:])
    with pytest.raises(CorrespondenceError, match="no place"):
        transfer(oracle, view0.image, xy, view1.image, mask1=torch.zeros(224, 224))
    with pytest.raises(RecipeError, match="stride=0"):
        TransferOptions(stride=0.0)


def test_images_of_any_kind_give_the_same(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255.0
    keypoints = torch.tensor([[10.0, 12.0], [40.5, 20.5]])
    model = build_extractor("test_vit", "random", lora_blocks=0).eval()
    expected = transfer(model, tensor, keypoints, tensor)
    for image in (pixels, Image.fromarray(pixels), file, str(file)):
        found = transfer(model, image, keypoints, image)
        assert torch.equal(found.keypoints1, expected.keypoints1)
