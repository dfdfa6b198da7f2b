"""Estimates of models on the same units, with bootstrap intervals: per-unit sums in, numbers out.

Every averaging rule of a protocol is a ratio of sums over units, so a resample of units is one
matrix product, whatever the number of rows. The area under a recall curve is one too, but for its
first straight pieces: with errors e < L of n pairs, SuperGlue's area (equifeat/metrics/curves.py)
is (Σ(L − e) + max(e) / 2) / (n L). Sum the trapezoids between recalls k/n and (k+1)/n to see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.metrics.permutation import swap_p_values
from equifeat.seeding import torch_generator

SAMPLES = 2000
# Resampling weights hold at most so many numbers at a time.
_BLOCK = 4_000_000


class UnitSums(NamedTuple):
    """What every unit adds to an estimate (Σ total + max top) / Σ weight, a row a training seed.

    Attributes:
        total: (S, N) float64.
        weight: (S, N) float64; 0 where the unit says nothing.
        top: (S, N) float64; zero but for areas under curves.
    """

    total: Float[Tensor, "s n"]
    weight: Float[Tensor, "s n"]
    top: Float[Tensor, "s n"]

    def values(self) -> Float[Tensor, "s"]:
        """Return the estimate of each seed.

        Returns:
            (S,) float64, NaN where nothing counts.
        """
        last = self.top.amax(1) if self.top.shape[1] else self.top.new_zeros(len(self.top))
        return _ratio(self.total.sum(1), self.weight.sum(1), last)

    def known(self) -> Tensor:
        """Return which units say anything.

        Returns:
            (N,) bool: those that count in at least one seed.
        """
        return (self.weight > 0).any(0)

    def at(self, units: Tensor) -> UnitSums:
        """Return the sums of some units.

        Args:
            units: (N,) bool.

        Returns:
            Sums of fewer units.
        """
        return UnitSums(*(part[:, units] for part in self))


class Estimate(NamedTuple):
    """A number with its 95 % bootstrap interval.

    Attributes:
        value: Mean over training seeds.
        low: Lower end; NaN with fewer than two units.
        high: Upper end.
        units: Units that count.
        seeds: Training seeds.
        sd: Standard deviation over training seeds; NaN with one.
    """

    value: float
    low: float
    high: float
    units: int
    seeds: int
    sd: float


class Difference(NamedTuple):
    """What a model differs by from another on the same units.

    Attributes:
        value: Second minus first.
        low: Lower end of the 95 % bootstrap interval; NaN with fewer than two units.
        high: Upper end.
        units: Units that count in both.
        p: Two-sided p of the paired permutation test; NaN with fewer than two units.
        p_holm: The same after Holm's correction over all tests of the task; NaN before it.
    """

    value: float
    low: float
    high: float
    units: int
    p: float
    p_holm: float = math.nan


def unit_sums(
    values: Float[Tensor, "s r"],
    unit: Int[Tensor, "r"],
    units: int,
    *,
    weights: Float[Tensor, "s r"] | None = None,
    each_unit_once: bool = False,
) -> UnitSums:
    """Return the sums of a mean over rows, or over units.

    Args:
        values: (S, R) one value a row; NaN says nothing.
        unit: (R,) index of each row's unit.
        units: Number of units N.
        weights: (S, R) weights of rows; 1 when None.
        each_unit_once: Whether each unit counts once, with the mean of its rows.

    Returns:
        The sums.

    Raises:
        RecipeError: A weight is negative or not finite.
    """
    known = ~values.isnan()
    w = known.double() if weights is None else torch.where(known, weights.double(), 0.0)
    if not (w.isfinite() & (w >= 0)).all():
        raise RecipeError("weights of rows must be finite numbers, 0 or more.")
    total, count = torch.zeros(2, len(values), units, dtype=torch.float64)
    total.index_add_(1, unit, torch.where(w > 0, w * values.double(), 0.0))
    count.index_add_(1, unit, w)
    if each_unit_once:
        on = count > 0
        total = torch.where(on, total / torch.where(on, count, 1.0), 0.0)
        count = on.double()
    return UnitSums(total, count, torch.zeros_like(total))


def area_sums(
    errors: Float[Tensor, "s r"], unit: Int[Tensor, "r"], units: int, limit: float
) -> UnitSums:
    """Return the sums of the area under the recall curve of rows' errors, in percent.

    Args:
        errors: (S, R) errors, infinite for failures; NaN says nothing.
        unit: (R,) index of each row's unit.
        units: Number of units N.
        limit: Largest error.

    Returns:
        The sums; the estimate is equifeat.metrics.curves.auc.

    Raises:
        RecipeError: The limit is not positive, or an error is negative.
    """
    if not limit > 0 or (errors < 0).any():
        raise RecipeError(f"the limit of an area ({limit:g}) must be above 0, errors 0 or more.")
    scale = 100.0 / limit
    below = errors < limit
    gain = torch.where(below, (limit - errors.double()) * scale, 0.0)
    last = torch.where(below, errors.double() * scale / 2.0, 0.0)
    total, count, top = torch.zeros(3, len(errors), units, dtype=torch.float64)
    total.index_add_(1, unit, gain)
    count.index_add_(1, unit, (~errors.isnan()).double())
    top.scatter_reduce_(1, unit.expand(len(errors), -1), last, "amax")
    return UnitSums(total, count, top)


def estimates(
    sums: Sequence[UnitSums], *, seed: int = 0, samples: int = SAMPLES, level: float = 0.95
) -> list[Estimate]:
    """Return numbers with percentile bootstrap intervals.

    A resample draws units with replacement, with all their rows. With several training seeds it
    draws seeds too, and averages over them: the interval then tells what other units and another
    training would give (a two-way bootstrap; Owen 2007, "The pigeonhole bootstrap").

    Args:
        sums: Of models and metrics on the same units.
        seed: Of the resampling; the same units are drawn for all.
        samples: Number of resamples.
        level: Coverage, between 0 and 1.

    Returns:
        One each.

    Raises:
        RecipeError: samples or level make no sense.
    """
    found: dict[int, Estimate] = {}
    for units, where in _grouped([s.known() for s in sums]):
        group, n = [sums[i].at(units) for i in where], int(units.sum())
        drawn = _resampled(group, seed, samples, level)
        for i, one, replicates in zip(where, group, drawn, strict=True):
            values = one.values()
            low, high = _ends(_over_seeds(replicates, seed, 1), n, level)
            sd = float(values.std()) if len(values) > 1 else math.nan
            found[i] = Estimate(float(values.mean()), low, high, n, len(values), sd)
    return [found[i] for i in range(len(sums))]


def differences(
    pairs: Sequence[tuple[UnitSums, UnitSums]],
    *,
    seed: int = 0,
    samples: int = SAMPLES,
    level: float = 0.95,
) -> list[Difference]:
    """Return second minus first, on the units that count in both.

    The interval draws the same units for both models, and the training seeds of each on their own;
    the test is `equifeat.metrics.permutation.swap_p_values` on means over training seeds.

    Args:
        pairs: First and second model, for every metric or model.
        seed: See `estimates`.
        samples: See `estimates`.
        level: See `estimates`.

    Returns:
        One a pair, not yet corrected for their number.

    Raises:
        RecipeError: samples or level make no sense.
    """
    found: dict[int, Difference] = {}
    for units, where in _grouped([a.known() & b.known() for a, b in pairs]):
        n = int(units.sum())
        group = [(pairs[i][0].at(units), pairs[i][1].at(units)) for i in where]
        drawn = _resampled([one for pair in group for one in pair], seed, samples, level)
        tests = swap_p_values([(_seed_mean(a), _seed_mean(b)) for a, b in group], seed=seed)
        for k, (i, (first, second), p) in enumerate(zip(where, group, tests, strict=True)):
            change = _over_seeds(drawn[2 * k + 1], seed, 2) - _over_seeds(drawn[2 * k], seed, 1)
            low, high = _ends(change, n, level)
            value = float(second.values().mean() - first.values().mean())
            found[i] = Difference(value, low, high, n, p)
    return [found[i] for i in range(len(pairs))]


def _grouped(masks: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
    """Positions of equal masks, so that each set of units is drawn once."""
    groups: dict[bytes, list[int]] = {}
    for i, mask in enumerate(masks):
        groups.setdefault(mask.numpy().tobytes(), []).append(i)
    for where in groups.values():
        yield masks[where[0]], where


def _resampled(
    sums: Sequence[UnitSums], seed: int, samples: int, level: float
) -> list[Float[Tensor, "b s"]]:
    """The estimate of every seed in every resample of units."""
    if samples < 1 or not 0.0 < level < 1.0:
        raise RecipeError(
            f"bootstrap samples={samples} and level={level} must satisfy samples ≥ 1 and "
            "0 < level < 1."
        )
    n, generator = sums[0].total.shape[1], torch_generator(seed)
    if n < 2:
        return [torch.full((samples, len(s.total)), math.nan, dtype=torch.float64) for s in sums]
    total = torch.cat([s.total for s in sums]).mT
    count = torch.cat([s.weight for s in sums]).mT
    top = torch.cat([s.top for s in sums])
    parts, at_once = [], max(1, _BLOCK // n)
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        drawn = torch.randint(n, (size, n), generator=generator)
        weights = torch.zeros(size, n, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
        last = torch.zeros(size, len(top), dtype=torch.float64)
        for k in top.any(1).nonzero()[:, 0].tolist():
            last[:, k] = top[k][drawn].amax(1)
        parts.append(_ratio(weights @ total, weights @ count, last))
    return list(torch.split(torch.cat(parts), [len(s.total) for s in sums], dim=1))


def _over_seeds(drawn: Float[Tensor, "b s"], seed: int, stream: int) -> Float[Tensor, "b"]:
    """Mean over training seeds drawn with replacement."""
    b, s = drawn.shape
    if s == 1:
        return drawn[:, 0]
    chosen = torch.randint(s, (b, s), generator=torch_generator(seed, stream))
    return drawn.gather(1, chosen).mean(1)


def _ends(drawn: Float[Tensor, "b"], units: int, level: float) -> tuple[float, float]:
    # a resample in which a seed counts nowhere has no value
    drawn = drawn[drawn.isfinite()]
    if units < 2 or not len(drawn):
        return math.nan, math.nan
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn, tails).tolist()
    return low, high


def _seed_mean(sums: UnitSums) -> tuple[Tensor, Tensor, Tensor]:
    """Means over training seeds for each unit, over those where it counts."""
    on = (sums.weight > 0).double()
    seeds = on.sum(0).clamp_min(1.0)
    total, count, top = ((part * on).sum(0) / seeds for part in sums)
    return total, count, top


def _ratio(total: Tensor, count: Tensor, last: Tensor) -> Tensor:
    return torch.where(count > 0, (total + last) / torch.where(count > 0, count, 1.0), math.nan)
