"""Metrics by hand, by property, and the coverage of the bootstrap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.metrics import (
    ape,
    bootstrap_interval,
    box_normalizer,
    matching_errors,
    normalizer_px,
    paired_difference,
    pcdp,
    pck,
)

ERRORS = st.lists(st.floats(0.0, 2.0, width=32), min_size=1, max_size=50)


def test_by_hand() -> None:
    true = torch.tensor([[10.0, 10.0], [20.0, 10.0], [30.0, 30.0], [0.0, 0.0]])
    pred = true + torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, -10.0], [30.0, 40.0]])
    errors = matching_errors(pred, true, 100.0)
    assert errors.tolist() == pytest.approx([0.0, 0.05, 0.1, 0.5])
    assert ape(errors) == pytest.approx(16.25)
    assert pcdp(errors, (0.051, 0.11, 0.2)) == (50.0, 75.0, 75.0)
    assert pck(errors, 0.5) == 100.0
    assert math.isnan(ape(torch.zeros(0)))


def test_normalizers() -> None:
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[3:9, 10:31] = True
    assert box_normalizer(mask) == 21.0
    assert box_normalizer(mask.T) == 21.0
    assert box_normalizer(mask.float() * 1.7) == 21.0
    assert normalizer_px(mask, "box") == 21.0
    assert normalizer_px(mask, "image") == 40.0
    with pytest.raises(CorrespondenceError, match="empty"):
        box_normalizer(torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(RecipeError, match="greater than 0"):
        matching_errors(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)


@given(ERRORS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_bounds_order_and_permutation(values: list[float], random: object) -> None:
    errors = torch.tensor(values)
    shares = pcdp(errors)
    assert all(0.0 <= share <= 100.0 for share in shares)
    assert list(shares) == sorted(shares)
    assert 100.0 * min(values) - 1e-4 <= ape(errors) <= 100.0 * max(values) + 1e-4
    shuffled = errors[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))]
    assert pcdp(shuffled) == shares
    assert ape(shuffled) == pytest.approx(ape(errors), rel=1e-9, abs=1e-9)


@given(ERRORS, st.floats(0.1, 100.0))
@settings(deadline=None, max_examples=50)
def test_scaling_points_and_normalizer_together_changes_nothing(
    values: list[float], factor: float
) -> None:
    pred = torch.tensor(values, dtype=torch.float64)[:, None] * torch.tensor([[0.6, 0.8]]).double()
    true = torch.zeros_like(pred)
    plain = matching_errors(pred, true, 1.0)
    scaled = matching_errors(pred * factor, true * factor, factor)
    torch.testing.assert_close(plain, scaled)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        values = torch.randn(40, generator=generator, dtype=torch.float64) + 3.0
        low, high = bootstrap_interval(values, seed=trial, samples=400)
        hits += int(float(low) <= 3.0 <= float(high))
    assert 0.89 <= hits / 200 <= 0.98


def test_bootstrap_agrees_with_the_normal_interval_and_is_seeded() -> None:
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values, seed=5)
    assert low.shape == high.shape == (3,)
    half = 1.96 * values.std(0) / 20.0
    torch.testing.assert_close(low, values.mean(0) - half, rtol=0.0, atol=0.015)
    torch.testing.assert_close(high, values.mean(0) + half, rtol=0.0, atol=0.015)
    again = bootstrap_interval(values, seed=5)
    assert torch.equal(low, again.low)
    assert not torch.equal(low, bootstrap_interval(values, seed=6).low)
    wider = bootstrap_interval(values, seed=5, level=0.99)
    assert (wider.low < low).all()


def test_bootstrap_edges() -> None:
    one = bootstrap_interval(torch.tensor([2.0]))
    assert math.isnan(float(one.low))
    same = bootstrap_interval(torch.full((7,), 2.0, dtype=torch.float64))
    assert float(same.low) == pytest.approx(2.0)
    assert float(same.high) == pytest.approx(2.0)
    for wrong in ({"samples": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(RecipeError, match="bootstrap"):
            bootstrap_interval(torch.zeros(3), **wrong)


def test_paired_difference_cancels_what_the_objects_share() -> None:
    generator = torch.Generator().manual_seed(2)
    hard = 10.0 * torch.randn(30, generator=generator, dtype=torch.float64)
    first = hard + 0.1 * torch.randn(30, generator=generator, dtype=torch.float64)
    second = hard + 1.0 + 0.1 * torch.randn(30, generator=generator, dtype=torch.float64)
    found = paired_difference(first, second)
    assert 0.9 < float(found.low) < float(found.mean) < float(found.high) < 1.1
    unpaired = bootstrap_interval(second)
    assert float(unpaired.high - unpaired.low) > 10.0 * float(found.high - found.low)
    back = paired_difference(second, first)
    assert float(back.mean) == pytest.approx(-float(found.mean))
    with pytest.raises(RecipeError, match="paired"):
        paired_difference(first, second[:5])
