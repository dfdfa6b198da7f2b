"""Areas under recall curves against integration, matching accuracy against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from equifeat.errors import RecipeError
from equifeat.metrics.curves import auc, matching_accuracy


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [1.0, 5.0, 20.0])
def test_auc_is_the_integral_of_the_curve(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    errors = [*rng.exponential(6.0, size=23).tolist(), float("inf"), float("inf")]
    below = [e for e in errors if e < limit]
    steps = 200_000
    # straight lines from (0, 0); np.interp is flat behind the last error below the limit
    middles = (np.arange(steps) + 0.5) * limit / steps
    values = np.interp(middles, [0.0, *sorted(below)], np.arange(len(below) + 1) / len(errors))
    assert auc(errors, limit) == pytest.approx(100.0 * values.mean(), abs=1e-3)


def test_auc_of_plain_cases() -> None:
    assert auc([0.0, 0.0], 5.0) == 100.0
    assert auc([np.inf, 7.0], 5.0) == 0.0
    # a triangle up to (2.5, 1/2), then flat: (0.625 + 1.25) / 5
    assert auc([2.5, 9.0], 5.0) == pytest.approx(37.5)
    assert math.isnan(auc([], 5.0))
    # an error at the limit is above it
    assert auc([5.0], 5.0) == 0.0
    with pytest.raises(RecipeError, match="greater than 0"):
        auc([1.0], 0.0)
    with pytest.raises(RecipeError, match="0 or more"):
        auc([math.nan], 5.0)


def test_matching_accuracy_against_a_loop() -> None:
    errors = torch.tensor([0.5, 1.0, 3.0, float("inf"), 2.999])
    expected = []
    for threshold in range(1, 11):
        good = 0
        for error in errors.tolist():
            good += error <= threshold
        expected.append(100.0 * good / 5)
    assert matching_accuracy(errors, range(1, 11)) == pytest.approx(tuple(expected))
    assert matching_accuracy(torch.zeros(0), (1, 2)) == (0.0, 0.0)
