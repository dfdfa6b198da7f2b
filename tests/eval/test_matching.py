"""Blocked nearest neighbours equal brute force and stay within the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.eval.matching import mutual_nearest, nearest
from tests.eval.allocations import Allocations


def descriptors(n: int, d: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g), dim=-1)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (37, 300), (300, 37), (128, 128), (0, 5)])
@pytest.mark.parametrize("budget", [4, 100, 4096, 2**26])
def test_equals_brute_force(n: int, m: int, budget: int) -> None:
    d0, d1 = descriptors(n, 16, 0), descriptors(m, 16, 1)
    full = d0 @ d1.T
    found = nearest(d0, d1, budget)
    best = full.argmax(1)
    assert torch.equal(found.matches0, best)
    torch.testing.assert_close(found.similarity, full.amax(1))
    mutual = mutual_nearest(d0, d1, budget)
    if n:
        agreed = full.argmax(0)[best] == torch.arange(n)
        assert torch.equal(mutual.matches0, torch.where(agreed, best, -1))
    assert len(mutual.matches0) == n


def test_never_builds_more_than_the_budget() -> None:
    n, m, d = 2000, 3000, 4
    d0, d1 = descriptors(n, d, 0), descriptors(m, d, 1)
    budget = 256 * 1024
    for match in (nearest, mutual_nearest):
        with Allocations() as seen:
            match(d0, d1, budget)
        assert seen.largest_bytes <= budget
        # A few small lists of N and M beside the blocks (two may be alive at a change).
        assert seen.peak_bytes < 2.5 * budget + 100 * (n + m)


def test_permutation_is_undone() -> None:
    d0 = descriptors(200, 32, 0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = mutual_nearest(d0, d0[order], 10_000)
    assert torch.equal(order[found.matches0], torch.arange(200))


def test_half_types_are_matched_in_float32() -> None:
    d0, d1 = descriptors(50, 16, 0).half(), descriptors(60, 16, 1).half()
    found = nearest(d0, d1)
    assert found.similarity.dtype == torch.float32
    assert torch.equal(found.matches0, (d0.float() @ d1.float().T).argmax(1))


def test_nothing_to_match() -> None:
    with pytest.raises(CorrespondenceError, match="0 descriptors"):
        nearest(descriptors(3, 4, 0), torch.zeros(0, 4))
    with pytest.raises(RecipeError, match="budget_bytes=1 "):
        nearest(descriptors(3, 4, 0), descriptors(3, 4, 1), 1)
