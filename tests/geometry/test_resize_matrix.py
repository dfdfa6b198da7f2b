"""Resizing as a product of matrices is torch's own resizing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equifeat.geometry.pixels import SizeHW, resize, resize_by_factor
from equifeat.geometry.resize_matrix import (
    cubic_resize_matrices,
    linear_resize_matrix,
    reference_resize_matrices,
)

OWN = (37, 24)
SIZES: list[SizeHW] = [(37, 24), (37, 12), (16, 16), (61, 30), (5, 47), (1, 1), (2, 24), (74, 3)]


def grid(size_hw: SizeHW = OWN) -> Tensor:
    return torch.randn(1, 6, *size_hw, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("new", SIZES)
def test_images(new: SizeHW) -> None:
    image = grid()
    rows, columns = (linear_resize_matrix(old, n) for old, n in zip(OWN, new, strict=True))
    assert torch.allclose(rows @ image @ columns.T, resize(image, new), atol=1e-5)


@pytest.mark.parametrize("new", SIZES)
def test_timms_positions(new: SizeHW) -> None:
    rows, columns = cubic_resize_matrices(OWN, new)
    got = rows @ grid() @ columns.T
    assert torch.allclose(got, resize(grid(), new, "bicubic"), atol=1e-5)
    assert torch.allclose(rows.sum(1), torch.ones(new[0]))
    if new == OWN:
        assert torch.equal(got, grid())


@pytest.mark.parametrize("new", SIZES)
def test_the_references_positions(new: SizeHW) -> None:
    rows, columns = reference_resize_matrices(OWN, new)
    got = rows @ grid() @ columns.T
    if new == OWN:
        assert torch.equal(got, grid())
        return
    factor = ((new[0] + 0.1) / OWN[0], (new[1] + 0.1) / OWN[1])
    expected = resize_by_factor(grid(), factor)
    assert expected.shape[-2:] == torch.Size(new)
    assert torch.allclose(got, expected, atol=2e-5)


def test_one_changed_side_is_enough_for_the_references_resampling() -> None:
    """Its code compares both sides: the unchanged one is resampled too, by 37.1 / 37."""
    rows, _ = reference_resize_matrices(OWN, (37, 12))
    assert not torch.allclose(rows, torch.eye(37), atol=1e-3)
