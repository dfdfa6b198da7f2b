"""Paired permutation tests over units, and Holm's correction for several of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.seeding import torch_generator

# All 2ⁿ exchanges are tried up to here; beyond, so many are drawn.
EXACT_UNITS, FLIPS = 12, 10_000
_BLOCK = 4_000_000
# Equal in exact arithmetic, but not in floating point.
_TIE = 1e-9

Sums = tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "n"]]


def swap_p_values(
    pairs: Sequence[tuple[Sums, Sums]], *, seed: int = 0, flips: int = FLIPS
) -> list[float]:
    """Return two-sided p values of "it does not matter which model is which", by exchanging units.

    If two models do equally well, each unit could as well have had its scores from the other
    model. The difference of the estimates is compared with those after exchanging the two models
    in some of the units. For means over units this is the sign-flip test of their differences
    (Good 2005, "Permutation, Parametric, and Bootstrap Tests of Hypotheses", 3.2). Up to 12 units
    all exchanges are tried; beyond, p = (1 + count) / (1 + flips) (Phipson and Smyth 2010).

    Args:
        pairs: First and second model of every comparison; each as total, count and top of the N
            units, with the estimate (Σ total + max top) / Σ count. All have the same N.
        seed: Of the exchanges.
        flips: How many are drawn when there are too many to try all.

    Returns:
        One p a pair; NaN with fewer than two units.
    """
    if not pairs:
        return []
    n = len(pairs[0][0][0])
    if n < 2:
        return [math.nan] * len(pairs)
    none = torch.zeros(1, n, dtype=torch.float64)
    seen = [abs(float(_change(none, *pair))) for pair in pairs]
    counts, tried = [0] * len(pairs), 0
    for exchanged in _exchanges(n, seed, flips):
        tried += len(exchanged)
        for k, pair in enumerate(pairs):
            found = _change(exchanged, *pair).abs()
            counts[k] += int((found >= seen[k] * (1.0 - _TIE)).sum())
    if n <= EXACT_UNITS:
        found_p = [count / tried for count in counts]
    else:
        found_p = [(1 + count) / (1 + tried) for count in counts]
    return [math.nan if math.isnan(s) else p for s, p in zip(seen, found_p, strict=True)]


def smallest_p(units: int, flips: int = FLIPS) -> float:
    """Return the smallest p that so many units can give.

    Args:
        units: Number of units.
        flips: As in `swap_p_values`.

    Returns:
        A probability; NaN with fewer than two units.
    """
    if units < 2:
        return math.nan
    return 2.0 / 2**units if units <= EXACT_UNITS else 1.0 / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected so that any false alarm among them stays as rare as stated.

    Args:
        p_values: One a test; NaN is no test.

    Returns:
        Corrected values in the same order (Holm 1979); NaN stays NaN.
    """
    order = sorted(
        (i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__
    )
    out, running = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[i]))
        out[i] = running
    return out


def _exchanges(n: int, seed: int, flips: int) -> Iterator[Tensor]:
    """(B, N) ones where the models are exchanged."""
    if n <= EXACT_UNITS:
        bits = torch.arange(2**n)[:, None] >> torch.arange(n)
        yield (bits & 1).double()
        return
    generator, at_once = torch_generator(seed, 3), max(1, _BLOCK // n)
    for start in range(0, flips, at_once):
        shape = (min(at_once, flips - start), n)
        yield torch.randint(2, shape, generator=generator).double()


def _change(exchanged: Tensor, first: Sums, second: Sums) -> Tensor:
    """(B,) second minus first after the exchanges."""
    return _after(exchanged, second, first) - _after(exchanged, first, second)


def _after(exchanged: Tensor, mine: Sums, theirs: Sums) -> Tensor:
    total = mine[0].sum() + exchanged @ (theirs[0] - mine[0])
    count = mine[1].sum() + exchanged @ (theirs[1] - mine[1])
    if mine[2].any() or theirs[2].any():
        total = total + torch.where(exchanged > 0, theirs[2], mine[2]).amax(1)
    return total / count
