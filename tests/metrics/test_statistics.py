"""Estimates, differences and tests: against loops, against SciPy, and by simulation."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.metrics.correlation import correlation
from equifeat.metrics.curves import auc
from equifeat.metrics.permutation import holm, smallest_p, swap_p_values
from equifeat.metrics.unit_sums import (
    UnitSums,
    area_sums,
    differences,
    estimates,
    unit_sums,
)

stats: Any = importlib.import_module("scipy.stats")


def values_of(shape: tuple[int, ...], seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + shift


def alone(values: Tensor) -> UnitSums:
    """One row a unit."""
    values = values if values.ndim == 2 else values[None]
    return unit_sums(values, torch.arange(values.shape[1]), values.shape[1])


def random_rows(seed: int, rows: int = 60, units: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randint(units, (rows,), generator=generator)
    values = torch.rand(1, rows, generator=generator, dtype=torch.float64) * 8
    values[0, ::7] = math.nan
    weights = torch.rand(1, rows, generator=generator, dtype=torch.float64)
    return values, unit, weights


def test_means_by_loops() -> None:
    values, unit, weights = random_rows(0)
    v, w, u = values[0].tolist(), weights[0].tolist(), unit.tolist()
    known = [i for i in range(60) if not math.isnan(v[i])]
    by_unit = [[v[i] for i in known if u[i] == k] for k in range(9)]
    means = [sum(x) / len(x) for x in by_unit if x]
    expected = {
        "units": sum(means) / len(means),
        "rows": sum(v[i] for i in known) / len(known),
        "weighted": sum(w[i] * v[i] for i in known) / sum(w[i] for i in known),
    }
    found = {
        "units": unit_sums(values, unit, 9, each_unit_once=True),
        "rows": unit_sums(values, unit, 9),
        "weighted": unit_sums(values, unit, 9, weights=weights),
    }
    for name, sums in found.items():
        assert float(sums.values()) == pytest.approx(expected[name])
    with pytest.raises(RecipeError, match="weights"):
        unit_sums(values, unit, 9, weights=-weights)


@pytest.mark.parametrize("seed", range(6))
def test_area_of_any_resample_is_the_area_of_its_errors(seed: int) -> None:
    values, unit, _ = random_rows(seed)
    values[0, ::5] = math.inf
    values[0, 1::9] = 3.0  # ties
    sums = area_sums(values, unit, 9, 5.0)
    drawn = torch.randint(9, (30, 9), generator=torch.Generator().manual_seed(seed))
    for units in [torch.arange(9), *drawn]:
        errors = torch.cat([values[0][(unit == k) & ~values[0].isnan()] for k in units])
        again = UnitSums(*(part[:, units] for part in sums))
        assert float(again.values()) == pytest.approx(auc(errors.numpy(), 5.0))
    with pytest.raises(RecipeError, match="limit"):
        area_sums(values, unit, 9, 0.0)


def test_interval_agrees_with_scipy() -> None:
    values = values_of((25,), 3)
    (found,) = estimates([alone(values)], seed=1, samples=20000)
    theirs = stats.bootstrap(
        (values.numpy(),), np.mean, method="percentile", n_resamples=20000, rng=0
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.02)
    assert found.high == pytest.approx(theirs.high, abs=0.02)
    assert (found.units, found.seeds) == (25, 1)


@pytest.mark.parametrize("kind", ["units", "rows", "difference"])
def test_intervals_cover_about_as_often_as_they_say(kind: str) -> None:
    hits, trials = 0, 200
    for trial in range(trials):
        # rows of a unit share its effect: resampling rows would be far too narrow
        generator = torch.Generator().manual_seed(trial)
        sizes = torch.randint(1, 9, (40,), generator=generator)
        unit = torch.repeat_interleave(torch.arange(40), sizes)
        shared = values_of((40,), 1000 + trial)[unit]
        rows = (shared + 0.3 * values_of((len(unit),), 2000 + trial) + 2.0)[None]
        first = unit_sums(rows, unit, 40, each_unit_once=kind == "units")
        if kind == "difference":
            change = values_of((40,), 3000 + trial)[unit] + 2.0
            second = unit_sums(rows + change, unit, 40)
            (low, high) = differences([(first, second)], seed=trial, samples=400)[0][1:3]
        else:
            (low, high) = estimates([first], seed=trial, samples=400)[0][1:3]
        hits += low <= 2.0 <= high
    assert 0.88 <= hits / trials <= 0.985


def test_seeds_widen_the_interval_and_equal_seeds_do_not() -> None:
    values = values_of((30,), 5)
    one = estimates([alone(values)])[0]
    same = estimates([alone(torch.stack([values] * 3))])[0]
    assert same[:3] == pytest.approx(one[:3])
    assert (same.seeds, same.sd) == (3, 0.0)
    apart = estimates([alone(torch.stack([values - 1, values, values + 1]))])[0]
    assert apart.value == pytest.approx(one.value)
    assert apart.sd == pytest.approx(1.0)
    assert apart.high - apart.low > 1.5 * (one.high - one.low)
    assert math.isnan(one.sd)


def test_missing_values_and_single_units() -> None:
    nan = math.nan
    sums = alone(torch.tensor([1.0, nan, 3.0, nan], dtype=torch.float64))
    one = alone(torch.tensor([nan, 2.0, nan, nan], dtype=torch.float64))
    none = alone(torch.full((4,), nan, dtype=torch.float64))
    two, single, nothing = estimates([sums, one, none])
    assert (two.value, two.units) == (2.0, 2)
    assert 1.0 <= two.low <= two.high <= 3.0
    assert (single.value, single.units) == (2.0, 1)
    assert math.isnan(single.low)
    assert math.isnan(nothing.value)
    apart = differences([(sums, one)])[0]
    assert apart.units == 0
    assert math.isnan(apart.value)
    assert math.isnan(apart.p)
    for wrong in ({"samples": 0}, {"level": 1.0}):
        with pytest.raises(RecipeError, match="bootstrap"):
            estimates([sums], **wrong)


@pytest.mark.parametrize("n", [4, 9, 12])
def test_exact_test_agrees_with_scipy(n: int) -> None:
    first, second = values_of((n,), n), values_of((n,), n + 50, 0.6)
    found = differences([(alone(first), alone(second))])[0]

    def statistic(a: Any, b: Any, axis: int) -> Any:
        return np.mean(b - a, axis=axis)

    theirs = stats.permutation_test(
        (first.numpy(), second.numpy()),
        statistic,
        permutation_type="samples",
        n_resamples=math.inf,
        vectorized=True,
    )
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.value == pytest.approx(theirs.statistic)


def test_exact_test_of_ratios_and_areas_by_loops() -> None:
    units = 6
    one, unit, w0 = random_rows(1, 30, units)
    two, _, _ = random_rows(2, 30, units)
    pairs = {
        "weighted": tuple(unit_sums(v, unit, units, weights=w0) for v in (one, two)),
        "auc": tuple(area_sums(v, unit, units, 5.0) for v in (one, two)),
    }
    for name, (a, b) in pairs.items():

        def change(swap: tuple[int, ...]) -> float:
            on = torch.tensor(swap, dtype=torch.bool)[unit]
            x, y = torch.where(on, two, one)[0], torch.where(on, one, two)[0]
            keep = ~x.isnan()
            if name == "auc":  # noqa: B023
                return auc(y[keep].numpy(), 5.0) - auc(x[keep].numpy(), 5.0)
            w = w0[0][keep]
            return float((w * y[keep]).sum() / w.sum() - (w * x[keep]).sum() / w.sum())

        every = [change(s) for s in itertools.product((0, 1), repeat=units)]
        expected = sum(abs(v) >= abs(every[0]) - 1e-12 for v in every) / len(every)
        assert differences([(a, b)])[0].p == pytest.approx(expected)


@pytest.mark.parametrize("n", [8, 20])
def test_p_is_uniform_when_models_are_equal(n: int) -> None:
    found = []
    for trial in range(300):
        a, b = alone(values_of((n,), 2 * trial)), alone(values_of((n,), 2 * trial + 1))
        pair = [tuple(part[0] for part in one) for one in (a, b)]
        found += swap_p_values([(pair[0], pair[1])], seed=trial, flips=400)  # type: ignore[list-item]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) <= 0.09


def test_clear_gains_and_the_smallest_p() -> None:
    first = values_of((40,), 1)
    gain = differences([(alone(first), alone(first + 1.0)), (alone(first), alone(first))])
    assert gain[0].p == smallest_p(40) == 1 / 10001
    assert [gain[0].low, gain[0].high] == pytest.approx([1.0, 1.0])
    assert gain[1].p == 1.0
    few = differences([(alone(first[:5]), alone(first[:5] + 1.0))])[0]
    assert few.p == smallest_p(5) == 2 / 32
    assert math.isnan(smallest_p(1))
    again = differences([(alone(first), alone(first + 1.0))])[0]
    assert again == gain[0]


def test_holm_by_hand() -> None:
    # 0.01·4, max(·, 0.02·3), max(·, 0.03·2), max(·, 0.5)
    p = [0.5, 0.01, math.nan, 0.03, 0.02]
    found = holm(p)
    assert found[:2] == pytest.approx([0.5, 0.04])
    assert math.isnan(found[2])
    assert found[3:] == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_correlation_agrees_with_scipy() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=14)
    y = 0.7 * x + generator.normal(size=14) * 0.5
    y[3] = y[4]
    pearson, spearman = correlation(x.tolist(), y.tolist())
    assert pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert -1 <= pearson.low < pearson.value < pearson.high <= 1
    assert pearson.points == 14
    flat, _ = correlation([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])
    assert math.isnan(flat.value)
    alone_point, _ = correlation([1.0, math.nan], [1.0, 2.0])
    assert alone_point.points == 1
    with pytest.raises(RecipeError, match="correlated"):
        correlation([1.0], [1.0, 2.0])
