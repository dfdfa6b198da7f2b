"""transport against closed forms and scalings of the exponentials themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.loss import transport
from tests.eval.allocations import Allocations
from tests.loss.cases import Inputs, crowded, gradients_equal, problem, row_of


def plan(case: Inputs, temperature: float, dustbin: float, iterations: int) -> Tensor:
    """Transport by scaling rows and columns of exp(s / T), no logarithms."""
    d0, d1, _, _ = case
    n, m = len(d0), len(d1)
    kernel = torch.full((n + 1, m + 1), math.exp(dustbin / temperature), dtype=torch.float64)
    kernel[:n, :m] = torch.exp(d0 @ d1.mT / temperature)
    rows, columns = torch.ones(n + 1).double(), torch.ones(m + 1).double()
    rows[n], columns[m] = m, n
    b = torch.ones_like(columns)
    for _ in range(iterations):
        a = rows / (kernel @ b)
        b = columns / (kernel.mT @ a)
    return a[:, None] * kernel * b[None]


def loop(case: Inputs, temperature: float, dustbin: float, iterations: int) -> Tensor:
    _, _, p0, p1 = case
    p = plan(case, temperature, dustbin, iterations)
    matched, lost = [], []
    for i in range(len(p0)):
        distance = (p1 - p0[i]).norm(dim=-1)
        matched += [-p[i, j].log() for j in (distance <= 5e-3).nonzero()[:, 0].tolist()]
        lost += [-p[i, -1].log()] if distance.min() > 0.1 else []
    for j in range(len(p1)):
        lost += [-p[-1, j].log()] if (p0 - p1[j]).norm(dim=-1).min() > 0.1 else []
    out = torch.stack(matched).mean()
    return (out + torch.stack(lost).mean()) / 2.0 if lost else out / 2.0


@pytest.mark.parametrize("case", [problem(20, 30, 12), problem(31, 17, 17), crowded(12, 16)])
@pytest.mark.parametrize("iterations", [1, 20])
def test_value_and_gradients_equal_scaled_exponentials(case: Inputs, iterations: int) -> None:
    ours = transport(*case, temperature=0.1, dustbin=0.4, iterations=iterations)
    gradients_equal(ours, loop(case, 0.1, 0.4, iterations), case[:2])


def test_gradcheck() -> None:
    d0, d1, p0, p1 = problem(4, 5, 3)
    assert torch.autograd.gradcheck(
        lambda a, b: transport(a, b, p0, p1, temperature=0.3, iterations=3), (d0, d1)
    )


def test_equal_scores_spread_the_masses() -> None:
    # All scores equal: cell = row mass x column mass / (N + M). Row 0 matches column 0, row 1 is
    # between the radii, row 2 and column 1 are far from everything.
    x = torch.tensor([0.0, 0.05, 3.0]).double()
    p0 = torch.stack([x, 0 * x, 0 * x], dim=1)
    p1 = torch.tensor([[0.0, 0.0, 0.0], [-3.0, 0.0, 0.0]]).double()
    value = transport(0.8 * torch.ones(3, 1).double(), torch.ones(2, 1).double(), p0, p1)
    n, m = 3, 2
    lost = (math.log((n + m) / n) + math.log((n + m) / m)) / 2.0
    assert float(value) == pytest.approx((math.log(n + m) + lost) / 2.0)


def test_clear_matches_and_clear_losses_cost_nothing() -> None:
    p0 = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).double()
    p1 = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]).double()
    d0 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    options: dict[str, Any] = {"temperature": 0.02, "dustbin": 0.6}
    # What is left falls with the iterations: masses that only just fit move slowly.
    assert 0.0 <= float(transport(d0, right, p0, p1, **options)) < 0.02
    assert 0.0 <= float(transport(d0, right, p0, p1, **options, iterations=400)) < 0.001
    # Column 1 is the true one now and similar to nothing.
    assert float(transport(d0, right[[1, 0, 2]], p0, p1, **options)) > 10.0


def test_the_dustbin_is_the_similarity_that_a_match_must_exceed() -> None:
    values = [float(transport(*row_of([s], [0.0]), dustbin=0.5)) for s in (0.3, 0.5, 0.7)]
    # At the dustbin's own similarity a lone pair is matched by half.
    assert values[1] == pytest.approx(math.log(2.0) / 2.0)
    assert values[0] > values[1] > values[2]


def test_views_may_be_swapped() -> None:
    d0, d1, p0, p1 = problem(14, 9, 6)
    there = transport(d0, d1, p0, p1, temperature=0.2, iterations=200)
    back = transport(d1, d0, p1, p0, temperature=0.2, iterations=200)
    torch.testing.assert_close(there, back)


def test_large_scores_stay_finite_in_float32() -> None:
    case = problem(40, 30, 20, dtype=torch.float32)
    value = transport(*case, temperature=1e-3)
    assert value.isfinite()
    for grad in torch.autograd.grad(value, case[:2]):
        assert grad.isfinite().all()
        assert grad.any()


def test_memory_does_not_grow_with_the_iterations() -> None:
    case = problem(120, 110, 100, dtype=torch.float32)
    peaks = []
    for iterations in (2, 20):
        with Allocations() as seen:
            torch.autograd.grad(transport(*case, iterations=iterations), case[:2])
        peaks.append(seen.peak_bytes)
    # Kept, 18 more iterations would be 36 more matrices.
    assert peaks[1] < peaks[0] + 2 * 120 * 110 * 4


@pytest.mark.parametrize(
    "option",
    [
        {"pos_radius": 0.2},
        {"temperature": 0.0},
        {"dustbin": float("inf")},
        {"iterations": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        transport(*problem(4, 4, 2), **option)
